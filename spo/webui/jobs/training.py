"""A training run as the page and the API ask for it: checked at once, then done by a job."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spo.algorithm.rollout import PoolVerdict
from spo.checkpoint.single_file import inspect_tensors
from spo.checkpoint.tensor_file import TensorEntry, TensorFile
from spo.checkpoint.webui_yaml import prediction_word
from spo.config import Config, build_config, read_config_file
from spo.demo.install import FILE_NAME as DEMO_CHECKPOINT
from spo.demo.install import install_demo
from spo.errors import SpoError
from spo.headless.plan import Plan, make_plan
from spo.images import to_picture
from spo.preference.load import BUNDLED, check_made_for, load_preference
from spo.presets import preset
from spo.progress import Progress, Watcher
from spo.prompts import read_prompts
from spo.report.curves import curves
from spo.runs.layout import RunFiles
from spo.training.judges import load_judges, with_judges
from spo.training.live_taste import live_taste
from spo.training.loop import TrainingReport, check_output, train
from spo.training.memory import loaded_scorer
from spo.webui import cards, folders, runs
from spo.webui.host import borrowed
from spo.webui.jobs.job import Example, Job, PoolPictures, ready_checkpoint, start
from spo.webui.jobs.memory import memory_text
from spo.webui.jobs.voting import fitted_on_device, votes_folder
from spo.webui.seam import webui

if TYPE_CHECKING:
    from torch import Tensor

    from spo.algorithm.preference import PreferenceModel
    from spo.webui.host import WebUIHost

# settings that are the WebUI's own here, by what the page calls them
HOST_OWNED = {
    "checkpoint": "the checkpoint at the top of the page",
    "vae": "the SD VAE setting",
    "prediction_type": "the checkpoint's yaml file",
    "clip_skip": "the Clip skip setting",
    "precision": "the WebUI's own precision",
    "device": "the WebUI's own device",
    "weight_storage": "the WebUI's FP8 weight setting",
    "vae_precision": "the WebUI's own precision",
    "vae_tiles": "the WebUI's own VAE",
    "taesd": "the SD VAE setting",
    "output": "the LoRA name",
    "run_folder": "the LoRA name",
    "prompts": "the prompts given",
    "pairs": "the prompts given",
}
POOL_PX = 512
DEMO_SAMPLES = ("mushroom", "sunflower", "cactus", "rocket")
DEMO_UPDATES = 60  # the demo chooses about so many (docs/stages.md)
_SAFETENSORS_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}


@dataclass(frozen=True)
class TrainingRequest:
    """name: the LoRA's; settings: flat, without those of HOST_OWNED; styles: names, applied to every prompt.

    resume  go on with the run of that name: its own settings and prompts, but for what `settings` gives
    preset  a named group of settings; both win over it, as on the command line
    """

    name: str
    prompts: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    styles: Sequence[str] = ()
    resume: bool = False
    preset: str = ""


@dataclass(frozen=True)
class Prepared:
    """A request that has been checked against the loaded checkpoint and the folders."""

    config: Config
    prompts: list[str]


def prepare(request: TrainingRequest) -> Prepared:
    """Check everything that can be checked without loading anything. Raises SpoError; nothing is touched."""
    checkpoint = ready_checkpoint()
    webui.refuse_training(checkpoint)
    path = folders.lora_path(request.name)
    for name in request.settings:
        if name in HOST_OWNED:
            raise SpoError(f"{name} is not a setting here: it comes from {HOST_OWNED[name]}; leave it out.")
    base: dict[str, Any] = {}
    if request.preset:
        chosen = preset(request.preset)
        if chosen.architecture not in ("", checkpoint.architecture):
            raise SpoError(
                f'preset "{chosen.label}" is for {chosen.architecture}, the loaded checkpoint is '
                f"{checkpoint.architecture}; choose another preset."
            )
        base = dict(chosen.values)
    values, prompts = {**base, **request.settings}, [text.strip() for text in request.prompts if text.strip()]
    if request.resume:
        files = folders.run_files(request.name)
        if not files.config.exists():
            raise SpoError(f'there is no run "{request.name}" to resume.')
        values = {**base, **read_config_file(files.config), **request.settings}
        prompts = read_prompts(files.prompts)
    else:
        styles = list(request.styles)
        prompts = [webui.with_styles(text, styles) for text in prompts]
        if not isinstance(values.get("negative_prompt", ""), str):
            raise SpoError(f"negative_prompt is {values['negative_prompt']!r}; it must be a text.")
        values["negative_prompt"] = webui.with_styles(values.get("negative_prompt", ""), styles, negative=True)
    if not prompts:
        raise SpoError("There are no prompts; write some, one a line, choose a file, or take the bundled list.")
    if not request.resume or "preference" in request.settings:
        values["preference"] = folders.preference_path(str(values.get("preference", "") or ""))
    if request.settings.get("live_votes"):
        values["live_votes"] = str(votes_folder(str(request.settings["live_votes"])))
    for role in ("judge", "adherence"):
        if role in request.settings:
            values[role] = folders.stage_judge_path(str(request.settings[role] or ""))
    if request.settings.get("start_from"):
        values["start_from"] = str(folders.lora_file(str(request.settings["start_from"])))
    if not values["preference"]:
        raise SpoError(
            "No preference model is chosen. Download the published one for the loaded checkpoint (5.2 GB) in the "
            "Preference tab, or vote there and fit one to your votes; then choose it."
        )
    check_made_for(values["preference"], checkpoint.file.name)
    values |= {
        "checkpoint": str(checkpoint.file),
        "prompts": str(folders.run_files(request.name).prompts),
        "output": str(path),
        "run_folder": str(folders.run_folder(request.name)),
        "clip_skip": webui.clip_skip(),
        "device": "auto",
        "precision": "auto",
        "vae": "",
        "prediction_type": "auto",
    }
    for side in ("width", "height"):
        values.setdefault(side, folders.usual_size_px(checkpoint.architecture, checkpoint.file.name))
    config = build_config(values, checkpoint.architecture)
    if not request.resume:
        check_output(config)
    return Prepared(config, prompts)


def plan_text(request: TrainingRequest) -> str:
    """What the run will do, in a few lines. Raises SpoError as `prepare`."""
    return plan_of(request)[1].text()


def plan_memory(prepared: Prepared) -> str:
    """What the run needs of the card in each phase, after some seconds. SpoError when no checkpoint is loaded."""
    checkpoint, card, config = webui.loaded_checkpoint(), webui.card(), prepared.config
    if webui.weights_in_float8():
        config = replace(config, model=replace(config.model, weight_storage="float8"))
    text_gib = vae_gib = 0.0
    if not checkpoint.low_memory:
        tensors = webui.tensors_of(checkpoint)
        text_gib = _half_gib(tensors, ("cond_stage_model.", "conditioner."))
        vae_gib = _half_gib(tensors, ("first_stage_model.",))
    card_gib = None if card is None else card.total_gib
    return memory_text(config, prepared.prompts, card_gib, text_gib=text_gib, vae_gib=vae_gib)


def _half_gib(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> float:
    """Of those tensors, in half precision."""
    return sum(2 * tensor.numel() for name, tensor in tensors.items() if name.startswith(prefixes)) / 2**30


def plan_of(request: TrainingRequest) -> tuple[Prepared, Plan]:
    """The request, checked, and what the run will do. Raises SpoError as `prepare`."""
    prepared, checkpoint = prepare(request), webui.loaded_checkpoint()
    # from what is in memory, since the WebUI loads pickles that we would not open
    tensors = {
        name: TensorEntry(tuple(tensor.shape), _SAFETENSORS_DTYPES.get(tensor.dtype, "F32"))
        for name, tensor in webui.tensors_of(checkpoint).items()
    }
    size_bytes = checkpoint.file.stat().st_size
    index = TensorFile(checkpoint.file, False, tensors, {}, size_bytes)
    info = inspect_tensors(index, None, prediction_word(checkpoint.prediction_type, "prediction type"))
    return prepared, make_plan(prepared.config, info, prepared.prompts)


def start_training(request: TrainingRequest, *, in_line: bool = False) -> Job:
    """Check the request, then train in the WebUI's queue. Raises SpoError at once for what cannot work.

    in_line  while other work goes on, after that (see `job.start`)
    """
    prepared = prepare(request)
    return start(
        "training",
        folders.lora_name(Path(prepared.config.run.output)),
        lambda job: _train(job, prepared, request.resume),
        in_line=in_line,
    )


def start_demo() -> Job:
    """Put the demo checkpoint into the WebUI, load it, and train on it. Raises SpoError for what cannot work."""
    webui.refuse_demo()
    install_demo(webui.models_folder(), webui.checkpoint_folder())
    webui.refresh_checkpoints()
    prompts = read_prompts(folders.BUNDLED_PROMPTS)
    short: dict[str, Any] = {"preference": BUNDLED, "steps": DEMO_UPDATES, "sample_every": 20, "save_every": 0}
    # few checks of few pictures: the first one comes before anything is seen
    short |= {"sample_prompts": list(DEMO_SAMPLES), "validate_every": 20, "validate_count": 16}
    request = TrainingRequest(folders.free_name("demo"), prompts, short, preset="demo")

    prepared: Prepared | None = None

    def load_and_train(job: Job) -> None:
        nonlocal prepared
        if prepared is None:
            job.say("Loading the demo checkpoint ...")
            webui.load_checkpoint(DEMO_CHECKPOINT)
            prepared = prepare(request)
        _train(job, prepared, False)

    return start("training", request.name, load_and_train)


def example_of(config: Config, prompts: Sequence[str]) -> Example:
    """What to look at the LoRA of a run with."""
    preference = Path(config.preference.preference).name
    return Example(
        (list(config.run.sample_prompts) or list(prompts))[:3],
        config.prompt.negative_prompt,
        config.prompt.width,
        config.prompt.height,
        config.rollout.sampling_steps,
        config.rollout.guidance_scale,
        preference if preference in folders.preference_choices() else "",
    )


def _train(job: Job, prepared: Prepared, resume: bool) -> None:

    config = prepared.config
    job.example = example_of(config, prepared.prompts)
    job.live_votes = config.preference.live_votes
    again = job.made_way
    say = job.show if again else job.say
    say(f"Loading the preference model {Path(config.preference.preference).name} ...")
    with borrowed(config, training=True, again=again) as host:
        job.asked_to_stop()
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always", UserWarning)
            preference = loaded_scorer(lambda: load_preference(config, host.device, host.architecture, say), job.say)
            preference = live_taste(config, preference, fitted_on_device, job.say)
            config = with_judges(config, host.architecture, prepared.prompts)
            judges = loaded_scorer(lambda: load_judges(config, host, say), job.say)
        for warning in doubts:
            say(str(warning.message))
        job.asked_to_stop()
        job.phase = "working"
        say(f"Training {job.name} on {host.checkpoint_name}.")
        watcher = _watcher(job, host, preference)
        report = train(host, config, prepared.prompts, preference, watcher, resume=resume or again, judges=judges)
    if report.made_way:
        job.made_way, job.phase = True, "waiting"
        job.show("Other pictures have their turn; training goes on afterwards.")
        return
    curves(report.files.metrics, report.files.curves)
    webui.refresh_loras()
    _say_end(job, config, report)


def _say_end(job: Job, config: Config, report: TrainingReport) -> None:
    job.output = report.output
    if report.output is None:
        job.phase = "finished" if report.finished else "stopped"
        if report.finished:
            threshold = config.rollout.threshold
            job.say(f"No pair was kept, so there is no LoRA: lower threshold (now {threshold:g}) or use more prompts.")
        else:
            job.say("Stopped before the first update; Resume in the Runs tab goes on.")
        return
    name = folders.lora_name(report.output)
    if report.finished:
        job.phase, job.fraction = "finished", 1.0
        text = f"Done: {name} is in the Lora tab; <lora:{report.output.stem}:1> in a prompt uses it."
        job.say(f"{text} {report.verdict}".strip())
    else:
        job.phase = "stopped"
        text = f"Stopped after {report.steps} updates and saved as {name}; Resume in the Runs tab goes on."
        job.say(f"{text} {report.verdict}".strip())


def _watcher(job: Job, host: WebUIHost, preference: PreferenceModel) -> Watcher:
    files = RunFiles.of(host.config.run.output, host.config.run.run_folder)
    job.rows[:], job.checks = runs.metrics(files), runs.checks(files)

    def progress(now: Progress) -> None:
        job.fraction, job.eta_s, job.step = now.fraction, now.eta_s, now.step
        if now.metrics and (not job.rows or job.rows[-1].get("batch") != now.metrics.get("batch")):
            job.rows.append(dict(now.metrics))
        job.checks = now.checks or job.checks
        samples = files.all_samples()
        job.picture = samples[-1] if samples else None
        job.first_samples = samples[0] if len(samples) > 1 else None
        job.version += 1
        _show_in_bar(job)

    return Watcher(
        progress=progress,
        should_stop=job.asked_to_stop,
        make_way=webui.others_wait,
        sample_now=job.take_sample_wish,
        verdict=_PoolWatch(job, host, preference),
        log=job.say,
        saved=lambda path: _saved(job, host, path),
    )


def _show_in_bar(job: Job) -> None:
    webui.show_progress(job.fraction, f"{job.shown_phase}, update {job.step}", job.eta_s)


def _saved(job: Job, host: WebUIHost, path: Path) -> None:
    webui.clear_interruption()  # or there would be no preview
    try:
        cards.write_card(host, path)
    except Exception as error:  # a LoRA without a preview is better than a run that ends for want of one
        webui.report(f"SPO: no card for {path.name}")
        job.say(f"{path.name} has no preview picture ({type(error).__name__}).")
    cards.drop_cards_without_lora(RunFiles.of(host.config.run.output, host.config.run.run_folder))
    webui.refresh_loras()
    job.say(f"Saved {folders.lora_name(path)}.")


class _PoolWatch:
    """Turns now and then a verdict into pictures for the page, for at most a twentieth of the time, if any looks."""

    def __init__(self, job: Job, host: WebUIHost, preference: PreferenceModel) -> None:
        self.job, self.host, self.preference = job, host, preference
        self.next_s = 0.0

    def __call__(self, verdict: PoolVerdict) -> None:
        _show_in_bar(self.job)
        began = time.monotonic()
        if began < self.next_s or time.time() - self.job.looked_at_s > 10:
            return
        self.job.pool = self._pictures(verdict)
        self.job.version += 1
        now = time.monotonic()
        self.next_s = now + 20 * (now - began)

    def _pictures(self, verdict: PoolVerdict) -> PoolPictures:

        one = 0  # the first image of the batch
        candidates = verdict.candidates
        if self.preference.needs_pixels:
            pixels: Tensor = candidates.pixels()[:, one]
        else:
            latents = candidates.x if candidates.denoised is None else candidates.denoised
            pixels = self.host.decode(latents[:, one])
        pictures = [to_picture(candidate.float().cpu()) for candidate in pixels]
        for picture in pictures:
            picture.thumbnail((POOL_PX, POOL_PX))
        choice = verdict.selection
        return PoolPictures(
            pictures=pictures,
            scores=verdict.scores[:, one].tolist(),
            win=int(choice.win[one]),
            lose=int(choice.lose[one]),
            parent=int(verdict.parents[one]),
            kept=bool(choice.kept[one]),
            step=verdict.step,
            timestep=round(verdict.timestep),
            prompt=self.host.last_prompts[one],
        )
