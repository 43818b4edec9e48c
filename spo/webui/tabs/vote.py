"""The Vote tab: two pictures, a key, the next two; then a taste head of one's own."""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from spo.errors import SpoError
from spo.images import to_picture
from spo.preference.taste.vote_zip import export_votes, import_votes
from spo.preference.taste.votes import VoteFolder
from spo.webui import a1111, folders
from spo.webui.jobs import clip_training, voting
from spo.webui.tabs import page

_SAME, _OTHER = "Same seed, other noise from a step on", "Different seeds"
_ANSWERS = ("left", "right", "tie", "skip")
_MAX_EARLIER = 200


@dataclass(frozen=True)
class PreferenceTab:
    """prompts: the field that the Train tab fills; lists: fields whose choices are files."""

    prompts: Any
    lists: list[Any]


def build() -> PreferenceTab:
    """The tab's contents; call inside its TabItem."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            folder = gr.Textbox("my-votes", label="Votes are kept as", elem_id="spo_vote_folder")
            prompts = gr.Textbox(
                label="Prompts to vote on, one a line", lines=5, max_lines=12, elem_id="spo_vote_prompts"
            )
            bundled = gr.Button("The bundled list", size="sm", elem_id="spo_vote_bundled")
            negative = gr.Textbox(label="Negative prompt of the pairs", lines=1, elem_id="spo_vote_negative")
            how = gr.Radio([_SAME, _OTHER], value=_SAME, label="The two pictures", elem_id="spo_vote_how")
            with gr.Row():
                step = gr.Number(4, precision=0, label="They part ways at step", elem_id="spo_vote_step")
                steps = gr.Number(20, precision=0, label="Sampling steps of a pair", elem_id="spo_vote_steps")
                guidance = gr.Number(5.0, label="CFG scale of a pair", elem_id="spo_vote_cfg")
            with gr.Row():
                width = gr.Number(
                    0, precision=0, label="Width of a pair", info="0: the model's.", elem_id="spo_vote_width"
                )
                height = gr.Number(
                    0, precision=0, label="Height of a pair", info="0: likewise.", elem_id="spo_vote_height"
                )
            with gr.Row():
                start = gr.Button("Start voting", variant="primary", elem_id="spo_vote_start")
                stop = gr.Button("End voting", elem_id="spo_vote_end")
            with gr.Accordion("Export and import", open=False):
                with gr.Row():
                    export = gr.Button("Export as zip", size="sm", elem_id="spo_vote_export")
                    upload = gr.UploadButton("Import a zip", size="sm", file_types=[".zip"], elem_id="spo_vote_import")
                exported = gr.File(label="Exported", visible=False, elem_id="spo_vote_zip")
        with gr.Column(scale=7, min_width=460):
            pair = gr.HTML(_pair(), elem_id="spo_vote_pair")
            with gr.Row():
                buttons = {
                    "left": gr.Button("Left is better (←)", elem_id="spo_vote_left"),
                    "tie": gr.Button("Tie (↑)", elem_id="spo_vote_tie"),
                    "right": gr.Button("Right is better (→)", elem_id="spo_vote_right"),
                    "skip": gr.Button("Skip (↓)", elem_id="spo_vote_skip"),
                }
                undo = gr.Button("Undo (Backspace)", elem_id="spo_vote_undo")
            said = gr.HTML(elem_id="spo_vote_said")
            with gr.Row():
                name = gr.Textbox("my-taste", label="Taste head's name", elem_id="spo_vote_name")
                beside = gr.Dropdown(
                    folders.preference_choices(), label="Show beside it", multiselect=True, elem_id="spo_vote_beside"
                )
                fit = gr.Button("Fit to my votes", variant="primary", elem_id="spo_vote_fit")
            fitted = gr.HTML(elem_id="spo_vote_fitted")
            with gr.Accordion("Two pictures of your own", open=False):
                with gr.Row():
                    own = [
                        gr.Image(label=side, type="pil", source="upload", height=240, elem_id=f"spo_vote_own_{side}")
                        for side in ("left", "right")
                    ]
                own_prompt = gr.Textbox(label="Their prompt", lines=1, elem_id="spo_vote_own_prompt")
                with gr.Row():
                    own_buttons = {
                        answer: gr.Button(text, size="sm", elem_id=f"spo_vote_own_is_{answer}")
                        for answer, text in (("left", "Left is better"), ("tie", "Tie"), ("right", "Right is better"))
                    }
                own_said = gr.HTML(elem_id="spo_vote_own_said")
            with gr.Accordion("Earlier votes", open=False, elem_id="spo_vote_gallery"):
                with gr.Row():
                    earlier = gr.Dropdown([], label="Vote", elem_id="spo_vote_earlier")
                    look = gr.Button("Show votes", size="sm", elem_id="spo_vote_look")
                pictures = gr.HTML(elem_id="spo_vote_pictures")
                with gr.Row():
                    answer = gr.Radio(list(_ANSWERS), label="Its answer", elem_id="spo_vote_answer")
                    change = gr.Button("Change the answer", size="sm", elem_id="spo_vote_change")
            with gr.Accordion("Train a step-aware CLIP on labelled pairs", open=False, elem_id="spo_clip"):
                pairs = gr.Textbox(
                    label="Labelled pairs",
                    info="A folder of win and lose pictures, or Pick-a-Pic's parquet files.",
                    elem_id="spo_clip_pairs",
                )
                with gr.Row():
                    begin = gr.Dropdown(
                        folders.preference_choices(),
                        label="Start the CLIP from",
                        allow_custom_value=True,
                        elem_id="spo_clip_from",
                    )
                    labels = gr.Dropdown(
                        ["", *folders.preference_choices()], value="", label="Labels from another model",
                        elem_id="spo_clip_labels",
                    )  # fmt: skip
                    clip_name = gr.Textbox("my-clip", label="Name of the CLIP", elem_id="spo_clip_name")
                with gr.Row():
                    updates = gr.Number(
                        0, precision=0, label="Updates of the CLIP", info="0: the paper's.", elem_id="spo_clip_steps"
                    )
                    rate = gr.Number(
                        0, label="Learning rate of the CLIP", info="0: the paper's.", elem_id="spo_clip_rate"
                    )
                    at_once = gr.Number(4, precision=0, label="Pairs per CLIP call", elem_id="spo_clip_pairs_per_call")
                    sums = gr.Number(
                        16, precision=0, label="Gradient accumulation of the CLIP", elem_id="spo_clip_accumulation"
                    )
                    side = gr.Number(
                        0, precision=0, label="Picture size", info="0: the model's.", elem_id="spo_clip_size"
                    )
                with gr.Row():
                    clip_start = gr.Button("Start training", elem_id="spo_clip_start")
                    clip_resume = gr.Button("Go on", elem_id="spo_clip_resume")
                clip_said = gr.HTML(elem_id="spo_clip_said")
    refresh = gr.Button("Refresh", elem_id="spo_vote_refresh")
    seen = gr.Textbox("", elem_id="spo_vote_seen", visible=False)

    bundled.click(lambda: folders.BUNDLED_PROMPTS.read_text(encoding="utf-8"), [], [prompts])
    asked = [folder, prompts, negative, how, step, steps, guidance, width, height]
    start.click(_start, asked, [pair, said])
    stop.click(_end, [], [pair])
    for given, button in buttons.items():
        button.click(_vote(given), [seen], [pair], _js="spo_vote_seen", show_progress="hidden")
    undo.click(_with_errors(_undo), [], [pair], show_progress="hidden")
    refresh.click(_pair, [], [pair], queue=False, show_progress="hidden")
    fit.click(_with_errors(_fit), [folder, name, beside], [fitted])
    for picture in own:
        picture.upload(_prompt_of, [picture, own_prompt], [own_prompt])
    for given, button in own_buttons.items():
        button.click(_with_errors(_own(given)), [folder, own_prompt, *own], [own_said])
    look.click(_earlier, [folder], [earlier])
    earlier.change(_show_vote, [folder, earlier], [pictures, answer])
    change.click(_with_errors(_change), [folder, earlier, answer], [said])
    clip_asked = [clip_name, pairs, begin, labels, updates, at_once, sums, rate, side]
    for button, resume in ((clip_start, False), (clip_resume, True)):
        begun = button.click(_with_errors(_clip(resume)), clip_asked, [clip_said])
        begun.then(None, [], [], _js="() => spo_refresh_now()")
    export.click(_export, [folder], [exported, said])
    upload.upload(_with_errors(_import), [folder, upload], [said])
    return PreferenceTab(prompts, [beside, begin, labels])


def read_lists() -> list[Any]:
    """`PreferenceTab.lists` as they are now."""
    choices = folders.preference_choices()
    return [gr.update(choices=choices), gr.update(choices=choices), gr.update(choices=["", *choices])]


def take_prompts(training: str, voting: str) -> str:
    """The prompts to vote on, when the Train tab sends its user here."""
    return voting or training or folders.bundled_prompts()


def _with_errors(work: Callable[..., str]) -> Callable[..., str]:
    def answer(*given: Any) -> str:
        try:
            return work(*given)
        except SpoError as error:
            return page.error(str(error))

    return answer


def _start(folder: str, prompts: str, negative: str, how: str, step: Any, steps: Any, guidance: Any, *size: Any) -> Any:
    request = voting.VotingRequest(
        folder=folder or "",
        prompts=(prompts or "").splitlines(),
        from_step=int(step or 0) if how == _SAME else None,
        sampling_steps=int(steps or 0),
        guidance_scale=float(guidance or 0),
        width=int(size[0] or 0),
        height=int(size[1] or 0),
        negative_prompt=negative or "",
    )
    try:
        voting.start(request)
    except SpoError as error:
        return _pair(), page.error(str(error))
    return _pair(), ""


def _end() -> str:
    voting.end()
    return _pair()


def _vote(answer: str) -> Callable[[str], str]:
    def vote(seen: str) -> str:
        session = voting.current()
        # a key pressed again before the next pair has come counts once
        if session is None or session.pair is None or session.pair.id != seen:
            return _pair()
        try:
            session.answer(answer)
        except SpoError as error:
            return page.error(str(error)) + _pair()
        return _pair()

    return vote


def _undo() -> str:
    session = voting.current()
    if session is None:
        raise SpoError("Press Start voting first.")
    session.undo()
    return _pair()


def _pair() -> str:
    """The pair that is shown, the counter and the accuracy so far. Its attributes are for the page's script."""
    session = voting.current()
    if session is None:
        return '<div class="spo-vote" data-ready="1" data-pair="">Choose prompts and press Start voting.</div>'
    counts = session.votes.counts()
    pair = session.pair
    below = (
        f"<p><b>{counts.left + counts.right} votes</b>, {counts.tie} ties, {counts.skip} skipped. "
        f"{html.escape(session.message)}</p>"
    )
    if session.fitting:
        below += "<p>Fitting to your votes ...</p>"
    elif session.report is not None:
        below += f'<pre class="spo-table">{html.escape(session.report.text())}</pre>'
    ready = pair is not None or session.ended
    inside = ""
    if pair is not None:
        images = "".join(
            f'<figure><img alt="{side}" src="{page.uri(to_picture(pixels))}"><figcaption>{side}</figcaption></figure>'
            for side, pixels in zip(("left", "right"), pair.pixels, strict=True)
        )
        inside = f'<div class="spo-row">{images}</div><p class="spo-vote-prompt">{html.escape(pair.prompt)}</p>'
    elif not session.ended:
        inside = "<p>The next pair is being made ...</p>"
    return (
        f'<div class="spo-vote" data-ready="{int(ready and not session.fitting)}" '
        f'data-pair="{pair.id if pair is not None else ""}" data-time="{time.time():.0f}">{inside}{below}</div>'
    )


def _clip(resume: bool) -> Callable[..., str]:
    def begin(name: str, pairs: str, start: str | None, labels: str | None, *numbers: Any) -> str:
        updates, at_once, sums, rate, side = numbers
        request = clip_training.ClipRequest(
            name=name or "",
            pairs=pairs or "",
            start=start or "",
            labels_from=labels or "",
            steps=int(updates or 0),
            pairs_per_call=int(at_once or 0),
            accumulation=int(sums or 0),
            learning_rate=float(rate or 0),
            size_px=int(side or 0),
            resume=resume,
        )
        started = clip_training.start_clip_training(request)
        return page.note(f"Training {started.name}; the Train tab shows how far it is, and stops it.")

    return begin


def _fit(folder: str, name: str, beside: list[str] | None) -> str:
    return page.note(voting.fit(folder, name, tuple(beside or ())))


def _prompt_of(picture: Any, written: str) -> str:
    """The prompt in a picture's infotext, unless one is written already."""
    return written if picture is None or written else a1111.prompt_of_picture(picture)


def _own(answer: str) -> Callable[..., str]:
    def vote(folder: str, prompt: str, left: Any, right: Any) -> str:
        if left is None or right is None:
            raise SpoError("Two pictures are needed; drop one on each side.")
        return page.note(voting.add_pictures(folder, prompt or "", left, right, answer))

    return vote


def _earlier(folder: str) -> Any:
    try:
        votes = _folder(folder).votes()[::-1][:_MAX_EARLIER]
    except SpoError:
        return gr.update(choices=[])
    return gr.update(choices=[f"{vote.id} · {vote.prompt[:60]} · {vote.answer}" for vote in votes], value=None)


def _show_vote(folder: str, line: str | None) -> tuple[str, Any]:
    if not line:
        return "", gr.update()
    vote_id = line.split(" · ")[0]
    try:
        place = _folder(folder)
        vote = next((vote for vote in place.votes() if vote.id == vote_id), None)
        paths = [path for path in place.pictures(vote_id) if path.exists()]
    except SpoError as error:
        return page.error(str(error)), gr.update()
    return page.row(paths), vote.answer if vote is not None else gr.update()


def _change(folder: str, line: str | None, answer: str | None) -> str:
    if not line or not answer:
        raise SpoError("Choose a vote and its new answer first.")
    vote = _folder(folder).change(line.split(" · ")[0], answer)
    return page.note(f'"{vote.prompt}" is now: {answer}.')


def _folder(name: str) -> Any:

    return VoteFolder(voting.votes_folder(name))


def _export(folder: str) -> tuple[Any, str]:

    try:
        place = voting.votes_folder(folder)
        path = place.parent / f"{place.name}-{time.strftime('%Y%m%d-%H%M%S')}.zip"
        count = export_votes(_folder(folder), path)
    except (SpoError, OSError) as error:
        return gr.update(), page.error(str(error))
    return gr.update(value=str(path), visible=True), page.note(f"Votes exported: {count}, to {path}.")


def _import(folder: str, file: Any) -> str:

    done = import_votes(_folder(folder), Path(file.name))
    return page.note(
        f"{done.added} votes added, {done.duplicates} were here already, {done.conflicts} had another answer here, "
        "which stays."
    )
