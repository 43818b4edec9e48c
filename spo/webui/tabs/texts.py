"""Every text of the tab that a translation must know, read from the page itself, so that none is forgotten."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

from spo.presets import NAMED
from spo.webui.tabs import page

_TAG = re.compile(r"<[^>]*>")
_NO_WORDS = re.compile(r"[\W\d_]*")
_IN_WORDS = (  # their choices are words
    "spo_preset", "spo_memory", "spo_strength", "spo_vote_size", "spo_vote_how", "spo_taste_txt2img_how",
)  # fmt: skip


def texts(block: Any) -> list[str]:
    """Texts of a gradio Blocks and of what is shown in it later, sorted: labels, hints, choices, buttons, paragraphs.

    Names of files, samplers and methods are none; what has a value in it cannot be translated by the WebUI.
    """
    found: set[str] = {text for preset in NAMED.values() for text in (preset.label, preset.text)} | {*page.WORDS}
    for component in block.blocks.values():
        if getattr(component, "elem_id", None) not in page.HIDDEN:
            found |= {text.strip() for text in _of(component) if isinstance(text, str)}
    return sorted(text for text in found if not _NO_WORDS.fullmatch(text))


def _of(component: Any) -> Iterable[Any]:
    kind, elem_id = type(component).__name__, str(getattr(component, "elem_id", "") or "")
    yield getattr(component, "label", None)
    yield getattr(component, "info", None)
    if kind == "Button":
        yield component.value
    if elem_id in _IN_WORDS:
        yield from (choice if isinstance(choice, str) else choice[0] for choice in component.choices)
    if kind == "HTML":
        yield from (html.unescape(text) for text in _TAG.split(str(component.value or "")))
