"""The Train tab: what to train on what, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from spo.errors import SpoError
from spo.presets import NAMED
from spo.prompts import read_prompts
from spo.webui import folders, saved_settings
from spo.webui.jobs import fetching, job
from spo.webui.jobs.probe import time_text
from spo.webui.jobs.training import TrainingRequest, plan_memory, plan_of, plan_text, start_demo, start_training
from spo.webui.packages import missing, missing_text
from spo.webui.seam import webui
from spo.webui.tabs import form, page, watch
from spo.webui.tabs.gradio_versions import script, stays_at_top

_NEW_HERE = (
    "<h3>New here?</h3><p>A small demo checkpoint comes with SPO. One click installs it, loads it and trains a LoRA on "
    "it: nothing is downloaded, and it takes a few minutes, even without a graphics card.</p>"
)
_NEW_HERE_WITHOUT_DEMO = (
    "<h3>New here?</h3><p>A first run: choose your SD1.5 or SDXL checkpoint at the top of the page, press Take the "
    "bundled list (or write prompts of your own), then Start. If there is no preference model for the checkpoint yet, "
    "Start says so, and offers two ways to one: a download, or voting on pictures.</p>"
)
_LISTED = ("start_from", "judge", "adherence")  # settings whose choices are files


@dataclass(frozen=True)
class TrainTab:
    """What other tabs and the page's refreshing need of this one.

    area, running, finished  see `watch.Looks`; downloads: line and stop button of a download
    compare, vote            buttons; preference, prompts: fields
    lists                    fields whose choices are files, and the newcomer's box, as `read_lists` fills them
    """

    area: watch.Area
    running: Any
    finished: Any
    downloads: tuple[Any, Any]
    compare: Any
    vote: Any
    preference: Any
    prompts: Any
    lists: list[Any]


def build() -> TrainTab:
    """The tab's contents; call inside its TabItem."""
    loaded, card = webui.glance(), webui.card()
    filling = form.Filling(form.usual_preset("", loaded), loaded.architecture or "sd15", memory=form.usual_memory(card))
    values = form.preset_values(filling.preset, filling.architecture, filling.memory)
    shown = dict(zip(form.names(), values, strict=True))
    takes_demo = _takes_demo()
    with gr.Column(visible=not folders.run_names(), elem_id="spo_newcomer") as newcomer:
        gr.HTML(_NEW_HERE, visible=takes_demo)
        gr.HTML(_NEW_HERE_WITHOUT_DEMO, visible=not takes_demo)
        with gr.Row():
            demo = gr.Button(
                "Try it: a demo of a few minutes", variant="primary", scale=4, visible=takes_demo, elem_id="spo_try"
            )
            hide = gr.Button("Hide this", scale=1, elem_id="spo_newcomer_hide")
    with gr.Row():
        with gr.Column(scale=5, min_width=360):
            with gr.Row():
                chosen = gr.Dropdown(
                    form.preset_labels(loaded),
                    value=NAMED[filling.preset].label,
                    label="Preset",
                    info=NAMED[filling.preset].text,
                    elem_id="spo_preset",
                )
                memory = gr.Dropdown(
                    list(form.MEMORY.values()),
                    value=form.MEMORY[filling.memory],
                    label="Memory",
                    info=form.memory_hint(card),
                    elem_id="spo_memory",
                )
            with gr.Row():
                preference = gr.Dropdown(
                    folders.preference_choices(),
                    value=folders.usual_preference(filling.architecture, loaded.file_name) or None,
                    label="Preference model",
                    info="What says which picture is better: files in models/SPO.",
                    elem_id="spo_preference",
                )
                webui.refresh_button(preference, folders.preference_choices, "spo_preference_refresh")
            about_preference = gr.HTML("", elem_id="spo_preference_text")
            prompts = gr.Textbox(
                label="Prompts, one a line",
                info="What the LoRA is trained on; it learns from pictures that it makes of them.",
                lines=6,
                max_lines=14,
                elem_id="spo_prompts",
                **stays_at_top(),
            )
            with gr.Row():
                bundled = gr.Button("Take the bundled list", size="sm", elem_id="spo_bundled")
                file = gr.UploadButton("From a file (.txt, .json, .jsonl, .csv)", size="sm", elem_id="spo_prompt_file")
            name = gr.Textbox(
                folders.free_name("my-style"),
                label="LoRA name",
                info="If it is taken, a number is put behind it.",
                max_lines=1,
                elem_id="spo_name",
            )
            with gr.Row():
                steps = gr.Number(
                    shown["steps"],
                    precision=0,
                    label=form.label("steps"),
                    info="0: ten times over the prompts.",
                    elem_id="spo_steps",
                )
                strength = gr.Radio(
                    list(form.STRENGTHS),
                    value="Usual",
                    label="Strength",
                    info="How far an update goes: half, the usual or twice the learning rate.",
                    elem_id="spo_strength",
                )
            with gr.Accordion("Advanced", open=False, elem_id="spo_advanced"), gr.Tabs(elem_id="spo_groups"):
                fields: dict[str, Any] = {}
                for title, members in form.groups().items():
                    with gr.TabItem(title, elem_id=f"spo_group_{title.lower()}"):
                        if title == "Sampling":
                            styles = gr.Dropdown(
                                webui.style_names(),
                                label="Styles",
                                info="The WebUI's styles, put on every prompt.",
                                multiselect=True,
                                elem_id="spo_styles",
                            )
                        fields |= form.group_fields(members, shown)
            with gr.Accordion("Saved settings", open=False, elem_id="spo_saved"):
                with gr.Row():
                    saved = gr.Dropdown(
                        saved_settings.names(),
                        label="Load settings",
                        info="What you saved, and those of earlier runs.",
                        elem_id="spo_settings_load",
                    )
                    webui.refresh_button(saved, saved_settings.names, "spo_settings_refresh")
                with gr.Row():
                    saved_name = gr.Textbox(label="Save settings as", max_lines=1, elem_id="spo_settings_name")
                    save = gr.Button("Save settings", size="sm", elem_id="spo_settings_save")
        with gr.Column(scale=6, min_width=360):
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="spo_start")
                check = gr.Button("Check first", elem_id="spo_plan_button")
            with gr.Column(scale=0, visible=False, elem_id="spo_no_preference") as lacking:
                lacking_text = gr.HTML("")
                with gr.Row():
                    fetch = gr.Button("Download it (5.2 GB)", variant="primary", elem_id="spo_fetch_now")
                    vote = gr.Button("Vote on pictures instead", elem_id="spo_vote_instead")
            plan = gr.HTML(_missing(), elem_id="spo_plan")
            fetched = gr.HTML("", elem_id="spo_download")
            stop_fetch = gr.Button("Stop the download", size="sm", visible=False, elem_id="spo_download_stop")
            with gr.Row(visible=False, elem_id="spo_running") as running:
                stop_save = gr.Button("Stop and save", elem_id="spo_stop_save")
                stop_now = gr.Button("Stop", variant="stop", elem_id="spo_stop")
                sample = gr.Button("Sample now", elem_id="spo_sample")
                clear = gr.Button("Empty the line", elem_id="spo_clear_line")
            with gr.Row(visible=False, elem_id="spo_finished") as finished:
                compare = gr.Button("See it with and without the LoRA", variant="primary", elem_id="spo_compare")
                send = gr.Button("Send to txt2img", elem_id="spo_send")
            area = watch.build_area("spo", "pictures", "pool", "curves", "log")
    filled = gr.Textbox(filling.text(), label="Filled for", elem_id="spo_filled")
    hello = gr.Button("Hello", elem_id="spo_hello")

    values = [{"preference": preference, "steps": steps, **fields}[setting] for setting in form.names()]
    asked = [filled, name, prompts, styles, *values]
    rate = fields["learning_rate"]

    demo.click(_try_demo, [], [plan, newcomer, prompts], **script("spo_try_demo")).then(
        None, [], [], **script("spo_refresh_now")
    )
    hide.click(None, [], [], **script("spo_hide_newcomer"))
    chosen.input(_choose, [chosen, memory, filled, *values], [chosen, strength, filled, *values])
    memory.input(_choose, [chosen, memory, filled, *values], [chosen, strength, filled, *values])
    strength.input(_choose_strength, [strength, filled], [rate])
    rate.change(_strength_of, [rate, filled], [strength], show_progress="hidden")
    preference.change(_about_preference, [preference], [about_preference], show_progress="hidden")
    file.upload(_prompts_of_file, [file], [prompts, plan])
    bundled.click(folders.bundled_prompts, [], [prompts])
    checked = check.click(page.with_errors(_check), asked, [plan])
    checked.then(page.with_errors(_time), [plan, *asked], [plan], show_progress="hidden")
    start.click(_start, asked, [plan, lacking, lacking_text]).then(None, [], [], **script("spo_refresh_now"))
    fetch.click(_fetch, [], [plan, lacking]).then(None, [], [], **script("spo_refresh_now"))
    stop_fetch.click(page.with_errors(_stop_fetching), [], [plan], queue=False).then(
        None, [], [], **script("spo_refresh_now")
    )
    for how, button in (("save", stop_save), ("now", stop_now)):
        stopped = button.click(page.with_errors(_stop(how)), [], [plan], queue=False)
        stopped.then(None, [], [], **script("spo_refresh_now"))
    sample.click(_sample, [], [plan], queue=False)
    clear.click(_clear_line, [], [plan], queue=False)
    send.click(None, [], [], **script("spo_send_to_txt2img"))
    save.click(_save_settings, [saved_name, *values], [plan, saved])
    saved.change(_load_settings, [saved], [plan, *values])
    follows = [styles, chosen, strength, filled, preference, *[field for field in values if field is not preference]]
    hello.click(_hello, [filled, *values], follows, show_progress="hidden", queue=False)
    return TrainTab(
        area=area,
        running=running,
        finished=finished,
        downloads=(fetched, stop_fetch),
        compare=compare,
        vote=vote,
        preference=preference,
        prompts=prompts,
        lists=[newcomer, preference, saved, *(fields[name] for name in _LISTED)],
    )


def read_lists(preference: str | None) -> list[Any]:
    """`TrainTab.lists` as they are now; with no preference model chosen yet, the usual one."""
    loaded = webui.glance()
    usual = preference or folders.usual_preference(loaded.architecture or "sd15", loaded.file_name) or None
    return [
        gr.update(visible=not folders.run_names()),
        gr.update(choices=folders.preference_choices(), value=usual),
        gr.update(choices=saved_settings.names()),
        *(gr.update(choices=form.choices_of(name)) for name in _LISTED),
    ]


def _takes_demo() -> bool:
    try:
        webui.refuse_demo()
    except SpoError:
        return False
    return True


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


_MEASURING = "time        one step of it is being measured, and its memory counted ..."


def _check(*given: Any) -> str:
    return page.note(f"{plan_text(_request(given))}\n{_MEASURING}")


def _time(shown: str, *given: Any) -> str:
    if _MEASURING not in shown:  # a sentence about what cannot work
        return shown
    prepared, plan = plan_of(_request(given))
    return page.note(f"{plan.text()}\n{time_text(prepared, plan)}\n{plan_memory(prepared)}")


def _start(*given: Any) -> tuple[str, Any, str]:
    hidden = gr.update(visible=False)
    try:
        request = _request(given)
        if not request.settings["preference"]:
            return "", gr.update(visible=True), _no_preference()
        taken = ""
        if not request.settings.get("replace"):
            free = folders.free_name(request.name, job.in_line())
            taken = f'"{request.name}" is taken, so this run is called "{free}".' if free != request.name else ""
            request = replace(request, name=free)
        started = start_training(request, in_line=True)
    except SpoError as error:
        return page.error(str(error)), hidden, ""
    started.looked_at_s = time.time()
    waits = f'"{started.name}" stands in line and begins when what goes on has ended.' if not started.task else ""
    return page.note(f"{taken} {waits}".strip()) if taken or waits else "", hidden, ""


def _clear_line() -> str:
    count = job.clear_line()
    return page.note(f"{count} taken out of the line." if count else "Nothing stood in line.")


def _no_preference() -> str:
    loaded = webui.glance()
    kind = "SDXL" if loaded.architecture == "sdxl" else "SD1.5"
    return (
        f"<p><b>A preference model is needed.</b> There is none for {kind} in models/SPO yet. Download the one that "
        "the paper's authors published; training can be started when it is there. Or vote on pictures: from 40 votes "
        "on, a model of your own taste can be fitted.</p>"
    )


def _try_demo() -> tuple[str, Any, Any]:
    try:
        started = start_demo()
    except SpoError as error:
        return page.error(str(error)), gr.update(), gr.update()
    started.looked_at_s = time.time()
    return "", gr.update(visible=False), folders.bundled_prompts()


def _fetch() -> tuple[str, Any]:
    try:
        fetching.start_fetching()
    except SpoError as error:
        return page.error(str(error)), gr.update()
    return "", gr.update(visible=False)


def _stop_fetching() -> str:
    fetching.stop()
    return ""


def _stop(how: str) -> Callable[[], str]:
    def stop() -> str:
        job.stop(how)
        return ""

    return stop


def _sample() -> str:
    current = job.current()
    if current is not None and current.live:
        current.sample_wanted = True
        current.say("Sample pictures come after this update.")
    return ""


def _choose(label: str, memory_label: str, filled: str, *values: Any) -> list[Any]:
    """The fields as the chosen preset and memory have them; what is no matter of presets stays as it is."""
    before, loaded = form.Filling.of(filled), webui.glance()
    name = next(one.name for one in NAMED.values() if one.label == label)
    memory = next((key for key, text in form.MEMORY.items() if text == memory_label), "")
    after = form.Filling(name, loaded.architecture or before.architecture, loaded.file_name, memory)
    stay = None if name == before.preset else ("preference", "negative_prompt", "sample_prompts", "start_from")
    fields = form.refilled(values, before, after, stay)
    return [gr.update(info=NAMED[name].text), _strength(fields, after), after.text(), *fields]


def _strength(fields: list[Any], filling: form.Filling) -> str | None:
    return form.strength_of(fields[form.names().index("learning_rate")], filling)


def _choose_strength(strength: str, filled: str) -> float:
    return form.learning_rate_of(strength, form.Filling.of(filled))


def _strength_of(rate: Any, filled: str) -> str | None:
    return form.strength_of(rate, form.Filling.of(filled))


def _hello(filled: str, *values: Any) -> list[Any]:
    """What a page shows that was just opened, or whose checkpoint changed: what suits it."""
    before, loaded = form.Filling.of(filled), webui.glance()
    styles = gr.update(choices=webui.style_names())
    choices, labels = folders.preference_choices(), form.preset_labels(loaded)
    if not loaded.file_name or (loaded.architecture, loaded.file_name) == (before.architecture, before.file_name):
        rest = [gr.update()] * (len(form.names()) - 1)
        return [styles, gr.update(choices=labels), gr.update(), gr.update(), gr.update(choices=choices), *rest]
    name = form.usual_preset(before.preset, loaded)
    after = form.Filling(name, loaded.architecture, loaded.file_name, before.memory)
    fields = form.refilled(values, before, after)
    strength = _strength(fields, after)
    by_name = dict(zip(form.names(), fields, strict=True))
    del by_name["preference"]
    usual = folders.usual_preference(after.architecture, after.file_name)
    return [
        styles,
        gr.update(choices=labels, value=NAMED[name].label, info=NAMED[name].text),
        strength,
        after.text(),
        gr.update(choices=choices, value=usual or None),
        *by_name.values(),
    ]


def _about_preference(name: str | None) -> str:
    return page.small(folders.preference_text(str(name or ""), webui.glance().architecture or "sd15"))


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
    return page.note(f"Settings saved as {path.stem}."), gr.update(choices=saved_settings.names())


def _load_settings(name: str | None) -> list[Any]:
    nothing = [gr.update()] * len(form.names())
    if not name:
        return ["", *nothing]
    try:
        return [page.note(f"Settings of {name} loaded."), *form.field_values(saved_settings.load(name))]
    except SpoError as error:
        return [page.error(str(error)), *nothing]


def _missing() -> str:
    lacking = missing()
    return page.error(missing_text(lacking)) if lacking else ""
