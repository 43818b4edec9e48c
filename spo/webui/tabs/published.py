"""Downloading the published preference model, wherever the page offers it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from spo.webui.jobs import fetching
from spo.webui.tabs import page
from spo.webui.tabs.gradio_versions import script

_ABOUT = (
    "<p>What the paper's authors published for the loaded checkpoint's kind: 5.2 GB, and 2.6 GB for its half-precision "
    "twin. Training and generation go on meanwhile. Other models are files that you put into models/SPO.</p>"
)


def build() -> tuple[Any, Any]:
    """Call inside an accordion. Line and stop button of a download, as `watch.Looks` keeps them."""
    gr.HTML(_ABOUT)
    fetch = gr.Button("Download it for the loaded checkpoint (5.2 GB)", elem_id="spo_fetch")
    said = gr.HTML(elem_id="spo_fetch_said")
    line = gr.HTML("", elem_id="spo_fetch_line")
    stop = gr.Button("Stop this download", size="sm", visible=False, elem_id="spo_fetch_stop")
    fetch.click(page.with_errors(_fetch), [], [said]).then(None, [], [], **script("spo_refresh_now"))
    stop.click(page.with_errors(_stop), [], [said], queue=False).then(None, [], [], **script("spo_refresh_now"))
    return line, stop


def _fetch() -> str:
    fetching.start_fetching()
    return ""


def _stop() -> str:
    fetching.stop()
    return ""
