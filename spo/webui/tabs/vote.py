"""The Preference tab: vote on pairs or pools, fit a taste head to the votes; train a step-aware CLIP."""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from spo.errors import SpoError
from spo.preference.taste.vote_zip import export_votes, import_votes
from spo.preference.taste.votes import Vote, VoteFolder, VotePool
from spo.webui import folders
from spo.webui.jobs import clip_training, voting
from spo.webui.seam import webui
from spo.webui.tabs import page
from spo.webui.tabs.gradio_versions import script, stays_at_top, uploads_only

_SAME, _OTHER = "Same seed, other noise from a step on", "Different seeds"
_SIZES = {"Four: the best, then the worst": 4, "Two: which is better": 2}
_CLIP_MEMORY = (
    "A CLIP of the published size (ViT-H) takes 21 GB; 17 GB with the text tower left as it is; 11 GB with 8-bit "
    "moments, too, which need the package bitsandbytes. Beside that come the diffusion model and a pass, some 3 GB."
)
_ON_A_WALL = 24  # earlier votes shown at a time
_WALL_PX = 160


@dataclass(frozen=True)
class PreferenceTab:
    """prompts: the field that the Train tab fills; lists: fields whose choices are files."""

    prompts: Any
    lists: list[Any]


def build() -> PreferenceTab:
    """The tab's contents; call inside its TabItem."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            prompts = gr.Textbox(
                label="Prompts to vote on, one a line", lines=5, max_lines=12, elem_id="spo_vote_prompts",
                **stays_at_top(),
            )  # fmt: skip
            bundled = gr.Button("Take the bundled list to vote on", size="sm", elem_id="spo_vote_bundled")
            size = gr.Radio(
                list(_SIZES), value=next(iter(_SIZES)), label="Pictures at a time",
                info="Two clicks on four pictures say five of their six comparisons.", elem_id="spo_vote_size",
            )  # fmt: skip
            with gr.Row():
                start = gr.Button("Start voting", variant="primary", elem_id="spo_vote_start")
                stop = gr.Button("End voting", elem_id="spo_vote_end")
            with gr.Accordion("How the pictures are made", open=False, elem_id="spo_vote_making"):
                folder = gr.Textbox(
                    "my-votes", label="Votes are kept as", info="A folder in models/SPO/votes.", max_lines=1,
                    elem_id="spo_vote_folder",
                )  # fmt: skip
                ahead = gr.Slider(
                    voting.READY, 200, voting.READY, step=1, label="Make ahead",
                    info="They wait on disk: end voting, and go on with them another day.", elem_id="spo_vote_ahead",
                )  # fmt: skip
                how = gr.Radio([_SAME, _OTHER], value=_SAME, label="How pictures differ", elem_id="spo_vote_how")
                with gr.Row():
                    step = gr.Slider(
                        0, 49, 4, step=1, label="They part ways at step", info="The earlier, the more they differ.",
                        elem_id="spo_vote_step",
                    )  # fmt: skip
                    steps = gr.Slider(1, 100, 20, step=1, label="Sampling steps to vote on", elem_id="spo_vote_steps")
                with gr.Row():
                    guidance = gr.Slider(1, 30, 5, step=0.5, label="CFG scale to vote on", elem_id="spo_vote_cfg")
                    negative = gr.Textbox(label="Negative prompt to vote on", lines=1, elem_id="spo_vote_negative")
                with gr.Row():
                    width = gr.Number(
                        0, precision=0, label="Width to vote on", info="0: the model's.", elem_id="spo_vote_width"
                    )
                    height = gr.Number(
                        0, precision=0, label="Height to vote on", info="0: likewise.", elem_id="spo_vote_height"
                    )
            with gr.Accordion("Export and import", open=False):
                with gr.Row():
                    export = gr.Button("Export as zip", size="sm", elem_id="spo_vote_export")
                    upload = gr.UploadButton("Import a zip", size="sm", file_types=[".zip"], elem_id="spo_vote_import")
                exported = gr.File(label="Exported", visible=False, elem_id="spo_vote_zip")
        with gr.Column(scale=7, min_width=360, elem_id="spo_vote_column"):
            pair = gr.HTML(_shown(), elem_id="spo_vote_pair")
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
                        gr.Image(label=side, type="pil", **uploads_only(), height=240, elem_id=f"spo_vote_own_{side}")
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
                gr.HTML(page.small("Click the picture that is better, or Tie, or Skip, to change a vote."))
                with gr.Row():
                    look = gr.Button("Show the newest", size="sm", elem_id="spo_vote_look")
                    older = gr.Button("Older", size="sm", elem_id="spo_vote_older")
                wall = gr.HTML(elem_id="spo_vote_wall")
            with gr.Accordion("Train a step-aware CLIP on labelled pairs", open=False, elem_id="spo_clip"):
                pairs = gr.Textbox(
                    label="Labelled pairs",
                    info="A folder of win and lose pictures, or Pick-a-Pic's parquet files, in models/SPO/pairs.",
                    elem_id="spo_clip_pairs",
                )
                with gr.Row():
                    begin = gr.Dropdown(
                        folders.preference_choices(),
                        label="Start the CLIP from",
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
                gr.HTML(page.small(_CLIP_MEMORY))
                with gr.Row():
                    train_text = gr.Checkbox(True, label="The text tower learns, too", elem_id="spo_clip_text")
                    small_moments = gr.Checkbox(False, label="8-bit moments", elem_id="spo_clip_8bit")
                with gr.Row():
                    clip_start = gr.Button("Start training", elem_id="spo_clip_start")
                    clip_resume = gr.Button("Go on", elem_id="spo_clip_resume")
                clip_said = gr.HTML(elem_id="spo_clip_said")
    refresh = gr.Button("Refresh", elem_id="spo_vote_refresh")
    choose, change = gr.Button("Choose", elem_id="spo_vote_choose"), gr.Button("Change", elem_id="spo_vote_change")
    seen, chosen = gr.Textbox("", visible=False), gr.Textbox("", visible=False)  # filled by the page's script

    bundled.click(folders.bundled_prompts, [], [prompts])
    asked = [folder, prompts, negative, size, ahead, how, step, steps, guidance, width, height]
    start.click(_start, asked, [pair, said], queue=False)
    stop.click(_end, [], [pair], queue=False)
    choose.click(_choose, [seen, chosen], [pair], **script("spo_vote_chosen"), show_progress="hidden")
    for given, button in buttons.items():
        button.click(_vote(given), [seen], [pair], **script("spo_vote_seen"), show_progress="hidden")
    undo.click(page.with_errors(_undo), [], [pair], show_progress="hidden")
    refresh.click(_shown, [], [pair], queue=False, show_progress="hidden")
    fit.click(page.with_errors(_fit), [folder, name, beside], [fitted])
    for picture in own:
        picture.upload(_prompt_of, [picture, own_prompt], [own_prompt])
    for given, button in own_buttons.items():
        button.click(page.with_errors(_own(given)), [folder, own_prompt, *own], [own_said])
    look.click(_newest, [folder], [wall])
    older.click(_older, [folder, seen], [wall], **script("spo_vote_oldest"))
    change.click(_change, [folder, seen, chosen], [wall, said], **script("spo_vote_changed"), show_progress="hidden")
    clip_asked = [clip_name, pairs, begin, labels, updates, at_once, sums, rate, side, train_text, small_moments]
    for button, resume in ((clip_start, False), (clip_resume, True)):
        begun = button.click(page.with_errors(_clip(resume)), clip_asked, [clip_said])
        begun.then(None, [], [], **script("() => spo_refresh_now()"))
    export.click(_export, [folder], [exported, said])
    upload.upload(page.with_errors(_import), [folder, upload], [said])
    return PreferenceTab(prompts, [beside, begin, labels])


def read_lists() -> list[Any]:
    """`PreferenceTab.lists` as they are now."""
    choices = folders.preference_choices()
    return [gr.update(choices=choices), gr.update(choices=choices), gr.update(choices=["", *choices])]


def take_prompts(training: str, voting: str) -> str:
    """The prompts to vote on, when the Train tab sends its user here."""
    return voting or training or folders.bundled_prompts()


def _start(
    folder: str, prompts: str, negative: str, size: str, ahead: Any, how: str, step: Any, steps: Any, cfg: Any, *px: Any
) -> Any:
    request = voting.VotingRequest(
        folder=folder or "",
        prompts=(prompts or "").splitlines(),
        from_step=int(step or 0) if how == _SAME else None,
        sampling_steps=int(steps or 0),
        guidance_scale=float(cfg or 0),
        width=int(px[0] or 0),
        height=int(px[1] or 0),
        negative_prompt=negative or "",
        size=_SIZES.get(size, 2),
        ahead=int(ahead or 0),
    )
    try:
        voting.start(request)
    except SpoError as error:
        return _shown(), page.error(str(error))
    return _shown(), ""


def _end() -> str:
    voting.end(0.0)
    return _shown()


def _vote(answer: str) -> Callable[[str], str]:
    return lambda seen: _answered(seen, lambda session: session.answer(answer))


def _choose(seen: str, chosen: str) -> str:
    """chosen: the numbers of the best and the worst from 0, "2,0"."""
    best, _, worst = chosen.partition(",")
    if not (best.isdigit() and worst.isdigit()):
        return page.error(f'"{chosen[:20]}" does not name two pictures.') + _shown()
    return _answered(seen, lambda session: session.choose(int(best), int(worst)))


def _answered(seen: str, record: Callable[[voting.Session], None]) -> str:
    session = voting.current()
    # a key pressed again before the next pictures have come counts once
    if session is None or session.pool is None or session.pool.id != seen:
        return _shown()
    try:
        record(session)
    except SpoError as error:
        return page.error(str(error)) + _shown()
    return _shown()


def _undo() -> str:
    session = voting.current()
    if session is None:
        raise SpoError("Press Start voting first.")
    session.undo()
    return _shown()


def _shown() -> str:
    """What is voted on, the counter and the accuracy so far. Its attributes are for the page's script."""
    session = voting.current()
    if session is None:
        return '<div class="spo-vote" data-ready="1" data-pair="">Choose prompts and press Start voting.</div>'
    counts, pool = session.votes.counts(), session.pool
    ahead = "" if session.ended else f", {len(session.ready)} made ahead"
    below = (
        f'<p role="status"><b>{counts.left + counts.right} votes</b>, {counts.tie} ties, {counts.skip} skipped{ahead}. '
        f"{html.escape(folders.placeless(session.message))}</p>"
    )
    if session.fitting:
        below += "<p>Fitting to your votes ...</p>"
    elif session.report is not None:
        below += f'<pre class="spo-table" tabindex="0">{html.escape(session.report.text())}</pre>'
    inside = ""
    if pool is not None:
        inside = _pictures(pool) + f'<p class="spo-vote-prompt">{html.escape(pool.prompt)}</p>'
    elif not session.ended:
        inside = "<p>The next pictures are being made ...</p>"
    ready = (pool is not None or session.ended) and not session.fitting
    return (
        f'<div class="spo-vote" data-ready="{int(ready)}" data-pair="{pool.id if pool is not None else ""}" '
        f'data-count="{session.request.size if pool is None else len(pool)}" data-time="{time.time():.0f}">'
        f"{inside}{below}</div>"
    )


def _pictures(pool: VotePool) -> str:
    """A pair's pictures look large when they are clicked; of more, a click names the best, and the next the worst."""
    if len(pool) == 2:
        sides = "".join(
            f"<figure>{page.zoom_button(path, side)}<figcaption>{side}</figcaption></figure>"
            for side, path in zip(("left", "right"), pool.pictures, strict=True)
        )
        return f'<div class="spo-row spo-together">{sides}</div>'
    cells = "".join(
        f'<figure><button type="button" class="spo-pick" data-number="{n}" aria-pressed="false">'
        f'<img alt="picture {n + 1}" src="{page.uri_of(path)}"></button><figcaption>{n + 1}</figcaption></figure>'
        for n, path in enumerate(pool.pictures)
    )
    return (
        '<p class="spo-vote-ask" aria-live="polite">Which is the best? Click it, or press its number.</p>'
        f'<div class="spo-row spo-four">{cells}</div>'
    )


def _clip(resume: bool) -> Callable[..., str]:
    def begin(name: str, pairs: str, start: str | None, labels: str | None, *numbers: Any) -> str:
        updates, at_once, sums, rate, side, train_text, small_moments = numbers
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
            train_text=bool(train_text),
            small_moments=bool(small_moments),
            resume=resume,
        )
        started = clip_training.start_clip_training(request)
        return page.note(f"Training {started.name}; the Train tab shows how far it is, and stops it.")

    return begin


def _fit(folder: str, name: str, beside: list[str] | None) -> str:
    return page.note(voting.fit(folder, name, tuple(beside or ())))


def _prompt_of(picture: Any, written: str) -> str:
    """The prompt in a picture's infotext, unless one is written already."""
    return written if picture is None or written else webui.prompt_of_picture(picture)


def _own(answer: str) -> Callable[..., str]:
    def vote(folder: str, prompt: str, left: Any, right: Any) -> str:
        if left is None or right is None:
            raise SpoError("Two pictures are needed; drop one on each side.")
        return page.note(voting.add_pictures(folder, prompt or "", left, right, answer))

    return vote


def _newest(folder: str) -> str:
    return _wall(folder, "")


def _older(folder: str, oldest: str) -> str:
    return _wall(folder, oldest)


def _wall(folder: str, before: str) -> str:
    """Earlier votes, the newest first, those before the vote of an id ("": all) as pictures that can be clicked."""
    try:
        place = _folder(folder)
        votes = place.votes()[::-1]
    except SpoError as error:
        return page.error(str(error))
    first = next((n + 1 for n, vote in enumerate(votes) if vote.id == before), 0)
    rows = "".join(_wall_row(vote, place.pictures(vote.id)) for vote in votes[first : first + _ON_A_WALL])
    return f'<div class="spo-wall">{rows}</div>' if rows else page.note("There are no earlier votes.")


def _wall_row(vote: Vote, pictures: tuple[Path, Path]) -> str:
    def button(answer: str, inside: str) -> str:
        pressed = str(vote.answer == answer).lower()
        return (
            f'<button type="button" class="spo-change" data-vote="{vote.id}" data-answer="{answer}" '
            f'aria-pressed="{pressed}">{inside}</button>'
        )

    sides = [
        button(side, f'<img alt="{side}" src="{page.uri_of(path, _WALL_PX)}">' if path.exists() else side)
        for side, path in zip(("left", "right"), pictures, strict=True)
    ]
    return (
        f'<figure data-vote="{vote.id}">{"".join(sides)}{button("tie", "Tie")}{button("skip", "Skip")}'
        f"<figcaption>{html.escape(vote.prompt[:80])}</figcaption></figure>"
    )


def _change(folder: str, vote_id: str, answer: str) -> tuple[str, str]:
    """The wall from where it begins now, and what happened. vote_id: "ID of the first row shown,ID to change"."""
    first, _, vote_id = vote_id.partition(",")
    try:
        place = _folder(folder)
        vote = place.change(vote_id, answer)
        ids = [vote.id for vote in place.votes()[::-1]]
        before = ids[ids.index(first) - 1] if first in ids[1:] else ""
    except SpoError as error:
        return _newest(folder), page.error(str(error))
    return _wall(folder, before), page.note(f'"{vote.prompt}" is now: {answer}.')


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
