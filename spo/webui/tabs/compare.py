"""The Compare tab: prompts x LoRA files or stages x weights, with scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import gradio as gr

from spo.errors import SpoError
from spo.preference.load import BUNDLED, BUNDLED_FILES
from spo.webui import folders
from spo.webui.jobs import job
from spo.webui.jobs.comparison import CompareRequest, start_comparison
from spo.webui.seam import webui
from spo.webui.tabs import page, watch
from spo.webui.tabs.gradio_versions import script

_NO_SCORES = "none"
T = TypeVar("T", int, float)


@dataclass(frozen=True)
class CompareTab:
    """area: see `watch.Looks`; asked: the fields in the order of `example_fields`; lists: whose choices are files."""

    area: watch.Area
    asked: list[Any]
    said: Any
    lists: list[Any]


def build() -> CompareTab:
    """The tab's contents; call inside its TabItem."""
    with gr.Row():
        with gr.Column(scale=4, min_width=360):
            with gr.Row():
                loras = gr.Dropdown(
                    folders.lora_names(), label="LoRAs and stages", multiselect=True, elem_id="spo_compare_loras"
                )
                webui.refresh_button(loras, folders.lora_names, "spo_compare_refresh")
            prompts = gr.Textbox(
                label="Prompts to compare on, one a line", lines=4, max_lines=12, elem_id="spo_compare_prompts"
            )
            negative = gr.Textbox(label="Negative prompt to compare with", lines=1, elem_id="spo_compare_negative")
            with gr.Row():
                weights = gr.Textbox("0.5, 1", label="Weights", elem_id="spo_compare_weights")
                seeds = gr.Textbox("1, 2", label="Seeds", elem_id="spo_compare_seeds")
                seeds_each = gr.Number(
                    0,
                    precision=0,
                    label="Own seeds for each prompt",
                    info="How many; 0: the list's.",
                    elem_id="spo_compare_seeds_each",
                )
            with gr.Row():
                preference = gr.Dropdown(
                    [_NO_SCORES, *folders.picture_judge_choices()],
                    value=_NO_SCORES,
                    label="Preference model for scores",
                    info="Its scores stand under the pictures.",
                    elem_id="spo_compare_preference",
                )
                sampler = gr.Dropdown(
                    webui.sampler_names(),
                    value="Euler a",
                    label="Sampling method",
                    elem_id="spo_compare_sampler",
                )
            judges = gr.Dropdown(
                folders.picture_judge_choices(),
                multiselect=True,
                label="Further judges",
                info="For the statistics and the page. Take one that training never saw.",
                elem_id="spo_compare_judges",
            )
            with gr.Row():
                steps = gr.Number(20, precision=0, label="Sampling steps of a picture", elem_id="spo_compare_steps")
                guidance = gr.Number(5.0, label="CFG scale of a picture", elem_id="spo_compare_cfg")
                width = gr.Number(
                    0, precision=0, label="Width of a picture", info="0: the model's.", elem_id="spo_compare_width"
                )
                height = gr.Number(
                    0, precision=0, label="Height of a picture", info="0: likewise.", elem_id="spo_compare_height"
                )
        with gr.Column(scale=6, min_width=420):
            with gr.Row():
                start = gr.Button("Compare", variant="primary", elem_id="spo_compare_start")
                stop = gr.Button("Stop", variant="stop", elem_id="spo_compare_stop")
            said = gr.HTML(elem_id="spo_compare_said")
            area = watch.build_area("spo_compare", "table", "pictures", "log")

    asked = [prompts, loras, weights, seeds, preference, negative, sampler, steps, guidance, width, height]
    asked += [judges, seeds_each]
    start.click(_start, asked, [said]).then(None, [], [], **script("spo_refresh_now"))
    stop.click(_stop, [], [said], queue=False).then(None, [], [], **script("spo_refresh_now"))
    return CompareTab(area, asked, said, [loras, preference, judges])


def read_lists() -> list[Any]:
    """`CompareTab.lists` as they are now."""
    judges = folders.picture_judge_choices()
    return [
        gr.update(choices=folders.lora_names()),
        gr.update(choices=[_NO_SCORES, *judges]),
        gr.update(choices=judges),
    ]


def compare_last() -> list[Any]:
    """Compare the LoRA of the last run with the checkpoint alone: what is said, and values of `CompareTab.asked`."""
    last = job.latest("training")
    if last is None or last.example is None or last.output is None:
        return [page.error("There is no LoRA of a run to show yet."), *[gr.update()] * 13]
    example, name = last.example, folders.lora_name(last.output)
    fields: list[Any] = [
        "\n".join(example.prompts),
        [name],
        "1",
        "1, 2",
        example.preference or _NO_SCORES,
        example.negative_prompt,
        "Euler a",
        example.sampling_steps,
        example.guidance_scale,
        example.width,
        example.height,
        [name for name in BUNDLED_FILES if name != BUNDLED] if example.preference == BUNDLED else [],
        0,
    ]
    said = _start(*fields)
    fields[1] = gr.update(choices=folders.lora_names(), value=[name])
    fields[4] = gr.update(choices=[_NO_SCORES, *folders.picture_judge_choices()], value=fields[4])
    return [said, *fields]


def _start(*given: Any) -> str:
    try:
        start_comparison(_request(*given))
    except SpoError as error:
        return page.error(str(error))
    return ""


def _request(
    prompts: str,
    loras: list[str] | None,
    weights: str,
    seeds: str,
    preference: str,
    negative: str,
    sampler: str,
    steps: float | None,
    guidance: float | None,
    width: float | None,
    height: float | None,
    judges: list[str] | None = None,
    seeds_each: float | None = None,
) -> CompareRequest:
    return CompareRequest(
        prompts=(prompts or "").splitlines(),
        loras=tuple(loras or ()),
        weights=_numbers("Weights", weights, float),
        seeds=_numbers("Seeds", seeds, int),
        preference="" if preference == _NO_SCORES else preference or "",
        negative_prompt=negative or "",
        sampler=sampler or "Euler a",
        steps=int(steps or 0),
        guidance_scale=float(guidance or 0),
        width=int(width or 0),
        height=int(height or 0),
        judges=tuple(judges or ()),
        seeds_each=int(seeds_each or 0),
    )


def _numbers(label: str, text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(part) for part in (text or "").replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise SpoError(f'{label} are "{text[:80]}"; give numbers with commas between them.') from None


def _stop() -> str:
    try:
        job.stop("save")
    except SpoError as error:
        return page.error(str(error))
    return page.note("Stopping; what is done so far is kept.")
