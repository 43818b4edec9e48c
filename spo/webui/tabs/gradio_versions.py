"""What Gradio 3 (A1111, reForge, classic) and Gradio 4 (Forge, neo) name differently, as keywords of a call."""

from __future__ import annotations

from typing import Any

import gradio as gr

_FOUR = int(gr.__version__.split(".")[0]) >= 4


def script(source: str) -> dict[str, Any]:
    """An event's function in the page: the name of one of javascript/spo.js, or one written out."""
    return {"js" if _FOUR else "_js": source}


def uploads_only() -> dict[str, Any]:
    """A picture comes from a file only: no camera, no clipboard."""
    return {"sources": ["upload"]} if _FOUR else {"source": "upload"}


def stays_at_top() -> dict[str, Any]:
    """A long text that is put into a box is seen from its beginning; Gradio 4 would scroll to its end."""
    return {"autoscroll": False} if _FOUR else {}
