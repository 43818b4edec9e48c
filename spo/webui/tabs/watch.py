"""What the tabs show of the work that goes on: each part is a component of its own, and changes when it must."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import gradio as gr

from spo.webui import folders
from spo.webui.jobs import fetching, job
from spo.webui.seam import webui
from spo.webui.tabs import page


@dataclass(frozen=True)
class Area:
    """The components of one tab; ids begin with name. parts: by `page.PARTS`; log_box: opens and closes the log."""

    name: str
    status: Any
    parts: dict[str, Any]
    log_box: Any


def build_area(prefix: str, *parts: str) -> Area:
    """Progress bar, message, and those parts, in this order."""
    with gr.Group(elem_id=f"{prefix}_progress_holder", elem_classes=["spo-progress"]):
        gr.HTML("", elem_id=f"{prefix}_progress")
    status = gr.HTML(page.status(job.current()), elem_id=f"{prefix}_status")
    shown = {part: gr.HTML("", elem_id=f"{prefix}_{part}") for part in parts if part != "log"}
    with gr.Accordion("Log", open=False, visible=False, elem_id=f"{prefix}_log_box") as box:
        shown["log"] = gr.HTML("", elem_id=f"{prefix}_log")
    return Area(prefix, status, shown, box)


class Looks:
    """The refresh that every open page asks for; what its page shows already is not sent again.

    seen       the keys of the parts that the page shows, as JSON, in a field that nobody sees
    train, compare  their areas: a comparison's parts are on the Compare tab, all others on the Train tab
    running, finished  what is to be seen while work goes on, and when a LoRA is there
    """

    def __init__(self, seen: Any, train: Area, compare: Area, running: Any, finished: Any, downloads: Any) -> None:
        self.areas = (train, compare)
        parts = [one for area in self.areas for one in (area.status, *area.parts.values(), area.log_box)]
        self.seen, self.outputs = seen, [seen, *parts, running, finished, *downloads]
        self.downloads = len(downloads)

    def look(self, seen: str) -> list[Any]:
        """The values of `outputs`."""
        now = job.current()
        if now is not None:
            now.looked_at_s = time.time()
        before: dict[str, str] = json.loads(seen or "{}")
        keys: dict[str, str] = {}
        values: list[Any] = []
        run, grid = job.latest("training", "preference training"), job.latest("comparison")
        for area, mine in zip(self.areas, (run, grid), strict=True):
            values.append(_status(now if now is not None and now.live else mine))
            own = page.part_keys(mine)
            for part in area.parts:
                name, key = f"{area.name} {part}", own[part]
                keys[name] = key
                if key == before.get(name, ""):
                    values.append(gr.update())
                else:
                    values.append(page.part(part, mine, key) if mine is not None and key else "")
            values.append(gr.update(visible=bool(own["log"])))
        live = now is not None and now.live
        done = not live and run is not None and run.kind == "training" and run.output is not None
        fetched = fetching.current()
        downloads = [page.download(fetched), gr.update(visible=fetched is not None and fetched.live)]
        seen = json.dumps(keys)
        return [seen, *values, gr.update(visible=live), gr.update(visible=done), *downloads * (self.downloads // 2)]


def _status(shown: job.Job | None) -> str:
    """The status with what the page's script watches besides: whether lists are to be read anew, and the checkpoint."""
    fetched = fetching.current()
    live = int(fetched is not None and fetched.live)
    run, title = job.latest("training"), webui.chosen_title()
    return page.status(shown, run, job.in_line(), download=live, lists=lists_key(), checkpoint=title)


def lists_key() -> str:
    """What changes when a list of files may have changed: an end of a run or of a download, and what was saved."""
    now, fetched = job.current(), fetching.current()
    ended = [f"{one.task} {one.live} {one.name}" for one in (now, fetched) if one is not None]
    folder = folders.preference_folder()
    return f"{ended} {folder.stat().st_mtime_ns if folder.exists() else 0}"
