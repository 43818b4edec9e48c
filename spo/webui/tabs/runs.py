"""The Runs tab: earlier runs with their curves and samples, to resume or to delete."""

from __future__ import annotations

from typing import Any

import gradio as gr

from spo.errors import SpoError
from spo.webui import folders, runs
from spo.webui.jobs import job
from spo.webui.jobs.training import TrainingRequest, start_training
from spo.webui.seam import webui
from spo.webui.tabs import page
from spo.webui.tabs.gradio_versions import script


def build() -> list[Any]:
    """The tab's contents; call inside its TabItem. The fields of `read_lists`."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                chosen = gr.Dropdown(folders.run_names(), label="Run", elem_id="spo_run")
                webui.refresh_button(chosen, folders.run_names, "spo_run_refresh")
            with gr.Row():
                steps = gr.Number(0, precision=0, label="Updates in all", info="0: as before.", elem_id="spo_run_steps")
                resume = gr.Button("Resume", variant="primary", elem_id="spo_resume")
            other = gr.Checkbox(
                False,
                label="Its preference model may have changed",
                info="A run is gone on with by the model that it was begun with, unless this is on.",
                elem_id="spo_run_other_preference",
            )
            with gr.Row():
                files_too = gr.Checkbox(False, label="Delete its LoRA files, too", elem_id="spo_delete_files")
                delete = gr.Button("Delete", variant="stop", elem_id="spo_delete")
            said = gr.HTML(elem_id="spo_runs_said")
        with gr.Column(scale=5, min_width=420):
            facts = gr.HTML(elem_id="spo_run_facts")
    chosen.change(_show, [chosen], [facts])
    follow = "(...given) => { setTimeout(spo_follow, 1000); return given; }"
    resume.click(_resume, [chosen, steps, other], [said], **script(follow))
    delete.click(_delete, [chosen, files_too], [said, chosen], **script("spo_confirm_delete"))
    return [chosen]


def read_lists() -> list[Any]:
    """The list of runs as it is now."""
    return [gr.update(choices=folders.run_names())]


def _show(name: str | None) -> str:
    if not name:
        return ""
    try:
        run = runs.read(name)
    except SpoError as error:
        return page.error(str(error))
    curves = page.curves(run.rows, run.checks) if run.rows else ""
    return f"{page.note(run.text())}{curves}{page.pictures(run.samples[-4:])}"


def _resume(name: str | None, steps: float | None, other_preference: bool = False) -> str:
    try:
        if not name:
            raise SpoError("Choose a run first.")
        # who names a length wants it, whether or not the judge still finds better stages
        settings: dict[str, Any] = {"steps": int(steps), "patience": 0} if steps else {}
        if other_preference:
            settings["allow_other_preference"] = True
        started = start_training(TrainingRequest(name, settings=settings, resume=True))
    except SpoError as error:
        return page.error(str(error))
    return page.note(f"Going on with {started.name}; see the Train tab.")


def _delete(name: str, files_too: bool) -> tuple[str, Any]:
    if not name:
        return "", gr.update()
    try:
        current = job.current()
        if current is not None and current.live and current.name == name:
            raise SpoError(f'"{name}" is still going on; stop it first.')
        deleted = runs.delete(name, files_too)
    except SpoError as error:
        return page.error(str(error)), gr.update()
    return page.note(f"Deleted {deleted} files of {name}."), gr.update(choices=folders.run_names(), value=None)
