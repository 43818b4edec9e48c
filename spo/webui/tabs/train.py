"""The Train tab: what to train on what, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from spo.demo.install import FILE_NAME as DEMO_CHECKPOINT
from spo.demo.install import install_demo
from spo.errors import SpoError
from spo.presets import NAMED
from spo.prompts import read_prompts
from spo.webui import a1111, folders, runs, saved_settings
from spo.webui.jobs import fetching, job
from spo.webui.jobs.training import TrainingRequest, plan_text, start_training
from spo.webui.packages import missing, missing_text
from spo.webui.tabs import form, page

_NO_DEMO = "New here? A small demo checkpoint lets you try everything in a few minutes, without a download."


@dataclass(frozen=True)
class TrainFields:
    """The fields that the Compare tab is filled from."""

    compare: Any
    prompts: Any


def build() -> TrainFields:
    """The tab's contents; call inside its TabItem."""
    filling = form.Filling(_usual_preset("", a1111.glance()), a1111.glance().architecture or "sd15")
    shown = dict(zip(form.names(), form.preset_values(filling.preset, filling.architecture), strict=True))
    with gr.Row():
        with gr.Column(scale=5, min_width=380):
            with gr.Row():
                labels = [preset.label for preset in NAMED.values()]
                chosen = gr.Dropdown(labels, value=NAMED[filling.preset].label, label="Preset", elem_id="spo_preset")
                about = gr.HTML(_about(filling.preset), elem_id="spo_preset_text")
            with gr.Row():
                preference = gr.Dropdown(
                    folders.preference_choices(),
                    value=folders.usual_preference(filling.architecture, filling.file_name),
                    label="Preference model",
                    info="Files in models/SPO.",
                    elem_id="spo_preference",
                )
                a1111.refresh_button(preference, folders.preference_choices, "spo_preference_refresh")
            about_preference = gr.HTML("", elem_id="spo_preference_text")
            prompts = gr.Textbox(label="Prompts, one a line", lines=6, max_lines=14, elem_id="spo_prompts")
            with gr.Row():
                file = gr.UploadButton("From a file (.txt, .json, .jsonl, .csv)", size="sm", elem_id="spo_prompt_file")
                bundled = gr.Button("The bundled list", size="sm", elem_id="spo_bundled")
            with gr.Row():
                negative = gr.Textbox(label="Negative prompt", lines=1, elem_id="spo_negative_prompt")
                styles = gr.Dropdown(a1111.style_names(), label="Styles", multiselect=True, elem_id="spo_styles")
            with gr.Row():
                name = gr.Textbox(folders.free_name("my-style"), label="LoRA name", elem_id="spo_name")
                steps = gr.Number(
                    shown["steps"], precision=0, label="Updates", info="0: by epochs.", elem_id="spo_steps"
                )
            with gr.Accordion("Advanced", open=False, elem_id="spo_advanced"):
                fields = form.advanced_fields(shown)
            with gr.Accordion("Saved settings", open=False), gr.Row():
                saved = gr.Dropdown(saved_settings.names(), label="Load settings", elem_id="spo_settings_load")
                a1111.refresh_button(saved, saved_settings.names, "spo_settings_refresh")
                saved_name = gr.Textbox(label="Save settings as", elem_id="spo_settings_name")
                save = gr.Button("Save settings", elem_id="spo_settings_save")
            with gr.Accordion("Published preference models", open=False):
                with gr.Row():
                    size = gr.Button("Show its size", size="sm", elem_id="spo_published")
                    fetch = gr.Button("Fetch for the loaded checkpoint", size="sm", elem_id="spo_fetch")
                fetch_said = gr.HTML(elem_id="spo_fetch_said")
            with gr.Accordion("Demo checkpoint", open=False):
                gr.HTML(_NO_DEMO)
                demo = gr.Button("Install the demo checkpoint", elem_id="spo_install_demo")
                demo_said = gr.HTML(elem_id="spo_demo_said")
        with gr.Column(scale=6, min_width=420):
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="spo_start")
                check = gr.Button("Show plan", elem_id="spo_plan_button")
            plan = gr.HTML(_missing(), elem_id="spo_plan")
            with gr.Row():
                stop_save = gr.Button("Stop and save", elem_id="spo_stop_save")
                stop_now = gr.Button("Stop", variant="stop", elem_id="spo_stop")
                sample = gr.Button("Sample now", elem_id="spo_sample")
            with gr.Group(elem_id="spo_progress_holder"):
                gr.HTML("", elem_id="spo_progress")
            status = gr.HTML(page.status(job.current()), elem_id="spo_status")
            with gr.Row():
                send = gr.Button("Send to txt2img", elem_id="spo_send")
                compare = gr.Button("Compare", elem_id="spo_compare")
    refresh = gr.Button("Refresh", elem_id="spo_refresh")
    hello = gr.Button("Hello", elem_id="spo_hello")
    filled = gr.Textbox(filling.text(), label="Filled for", elem_id="spo_filled")

    front = {"preference": preference, "negative_prompt": negative, "steps": steps}
    values = [{**front, **fields}[setting] for setting in form.names()]
    asked = [filled, name, prompts, styles, *values]

    chosen.input(_choose_preset, [chosen, filled, *values], [about, filled, *values])
    preference.change(_about_preference, [preference], [about_preference])
    file.upload(_prompts_of_file, [file], [prompts, plan])
    bundled.click(lambda: folders.BUNDLED_PROMPTS.read_text(encoding="utf-8"), [], [prompts])
    check.click(_with_errors(lambda *given: page.note(plan_text(_request(given)))), asked, [plan])
    start.click(_start, asked, [plan, status])
    stop_save.click(_with_errors(lambda: _stop("save")), [], [status], queue=False)
    stop_now.click(_with_errors(lambda: _stop("now")), [], [status], queue=False)
    sample.click(_sample, [], [status], queue=False)
    refresh.click(_look, [], [status], queue=False, show_progress="hidden")
    refills = [
        status,
        styles,
        chosen,
        about,
        filled,
        preference,
        *[field for field in values if field is not preference],
    ]
    hello.click(_hello, [filled, *values], refills, show_progress="hidden")
    send.click(None, [], [], _js="spo_send_to_txt2img")
    save.click(_save_settings, [saved_name, *values], [plan, saved])
    saved.change(_load_settings, [saved], [plan, *values])
    demo.click(_install_demo, [], [demo_said])
    size.click(_with_errors(lambda: page.note(fetching.published().text())), [], [fetch_said])
    fetch.click(_fetch, [], [fetch_said, status])
    return TrainFields(compare, prompts)


def _request(given: tuple[Any, ...]) -> TrainingRequest:
    filled, name, prompts, styles, *values = given
    filling = form.Filling.of(filled)
    return TrainingRequest(
        str(name or "").strip(),
        (prompts or "").splitlines(),
        form.edits(values, filling.preset, filling.architecture),
        tuple(styles or ()),
        preset=filling.preset,
    )


def _with_errors(work: Callable[..., str]) -> Callable[..., str]:
    """`work`, whose SpoError becomes its answer."""

    def answer(*given: Any) -> str:
        try:
            return work(*given)
        except SpoError as error:
            return page.error(str(error))

    return answer


def _start(*given: Any) -> tuple[str, str]:
    try:
        request = _request(given)
        free = folders.free_name(request.name)
        taken = f'"{request.name}" is taken, so this run is called "{free}".\n' if free != request.name else ""
        request = replace(request, name=free)
        plan = taken + plan_text(request)
        started = start_training(request)
    except SpoError as error:
        return page.error(str(error)), page.status(job.current())
    started.looked_at_s = time.time()
    return page.note(plan), page.status(started)


def _fetch() -> tuple[str, str]:
    try:
        started = fetching.start_fetching()
    except SpoError as error:
        return page.error(str(error)), page.status(job.current())
    return page.note(f"Fetching {started.name}; Stop ends it, and it goes on from there the next time."), _look()


def _stop(how: str) -> str:
    job.stop(how)
    return page.status(job.current())


def _sample() -> str:
    current = job.current()
    if current is not None and current.live:
        current.sample_wanted = True
        current.say("Sample pictures come after this update.")
    return page.status(current)


def _look() -> str:
    current = job.current()
    if current is not None:
        current.looked_at_s = time.time()
    return page.status(current)


def to_compare(prompts: str) -> tuple[Any, ...]:
    """The last LoRA, three of its prompts and its size, for the Compare tab."""
    current, nothing = job.current(), gr.update()
    if current is None or current.kind != "training" or current.output is None:
        return nothing, nothing, nothing, nothing
    try:
        config = runs.read(current.name).config
    except SpoError:
        return nothing, nothing, nothing, nothing
    lora = folders.lora_name(current.output)
    first_prompts = "\n".join((prompts or "").splitlines()[:3])
    size = [gr.update(value=config[side]) for side in ("width", "height")]
    return gr.update(choices=folders.lora_names(), value=[lora]), first_prompts or nothing, *size


def _usual_preset(now: str, loaded: a1111.Glance) -> str:
    """The preset for the loaded checkpoint: `now`, if it suits that."""
    if loaded.file_name == DEMO_CHECKPOINT:
        return "demo"
    suits = now in NAMED and now != "demo" and NAMED[now].architecture in ("", loaded.architecture or "sd15")
    return now if suits else "paper-sdxl" if loaded.architecture == "sdxl" else "paper-sd15"


def _choose_preset(label: str, filled: str, *values: Any) -> list[Any]:
    """The fields as the chosen preset has them; what is no matter of presets stays as it is."""
    before, loaded = form.Filling.of(filled), a1111.glance()
    name = next(preset.name for preset in NAMED.values() if preset.label == label)
    after = form.Filling(name, loaded.architecture or before.architecture, loaded.file_name)
    stay = ("preference", "negative_prompt", "sample_prompts")
    return [_about(name), after.text(), *form.refilled(values, before, after, stay)]


def _hello(filled: str, *values: Any) -> list[Any]:
    """What a page shows that was just opened, or whose checkpoint changed: the work that goes on, and what suits it."""
    before, loaded = form.Filling.of(filled), a1111.glance()
    look = [_look(), gr.update(choices=a1111.style_names())]
    choices = folders.preference_choices()
    rest = [gr.update()] * (len(form.names()) - 1)
    if not loaded.file_name or (loaded.architecture, loaded.file_name) == (before.architecture, before.file_name):
        return [*look, gr.update(), gr.update(), gr.update(), gr.update(choices=choices), *rest]
    after = form.Filling(_usual_preset(before.preset, loaded), loaded.architecture, loaded.file_name)
    preference = folders.usual_preference(after.architecture, after.file_name)
    fields = dict(zip(form.names(), form.refilled(values, before, after), strict=True))
    del fields["preference"]
    return [
        *look,
        NAMED[after.preset].label,
        _about(after.preset),
        after.text(),
        gr.update(choices=choices, value=preference or None),
        *fields.values(),
    ]


def _about(name: str) -> str:
    return f"<p>{NAMED[name].text}</p>"


def _about_preference(name: str | None) -> str:
    return page.small(folders.preference_text(str(name or ""), a1111.glance().architecture or "sd15"))


def _prompts_of_file(file: Any) -> tuple[Any, str]:

    if file is None:
        return gr.update(), ""
    try:
        return "\n".join(" ".join(prompt.split()) for prompt in read_prompts(file.name)), ""
    except SpoError as error:
        return gr.update(), page.error(str(error))


def _save_settings(name: str, *values: Any) -> tuple[str, Any]:
    try:
        path = saved_settings.save(name, form.read(values))
    except SpoError as error:
        return page.error(str(error)), gr.update()
    return page.note(f"Settings saved as {path}."), gr.update(choices=saved_settings.names())


def _load_settings(name: str | None) -> list[Any]:
    nothing = [gr.update()] * len(form.names())
    if not name:
        return ["", *nothing]
    try:
        return [page.note(f"Settings of {name} loaded."), *form.field_values(saved_settings.load(name))]
    except SpoError as error:
        return [page.error(str(error)), *nothing]


def _install_demo() -> str:

    try:
        installed = install_demo(a1111.models_folder(), a1111.checkpoint_folder())
    except SpoError as error:
        return page.error(str(error))
    a1111.refresh_checkpoints()
    return page.note(
        f"{installed.checkpoint.name} is installed. Press the refresh button beside the checkpoint at the top of the "
        "page, choose it, then choose the preset Demo checkpoint."
    )


def _missing() -> str:

    lacking = missing()
    return page.error(missing_text(lacking)) if lacking else ""
