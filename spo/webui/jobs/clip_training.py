"""Training a step-aware CLIP from the tab, on labelled pairs and the loaded checkpoint's predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import build_config
from spo.errors import SpoError
from spo.preference.clip.accuracy import accuracy_curves, accuracy_table
from spo.preference.clip.pair_data import open_pairs
from spo.preference.load import load
from spo.progress import Watcher
from spo.training.clip import PRESETS, ClipTraining, check_output, memory_bytes, starting_model, train_clip
from spo.webui import folders
from spo.webui.host import borrowed
from spo.webui.jobs.job import Job, ready_checkpoint, start
from spo.webui.seam import webui

if TYPE_CHECKING:
    from spo.progress import Progress
    from spo.training.clip import ClipTraining

_BESIDE_GIB = 3  # a pass of the model, the diffusion model in half precision, and the driver


@dataclass(frozen=True)
class ClipRequest:
    """pairs: a folder or parquet files (see `pair_data`); start: the model to begin with.

    steps, learning_rate  0: the paper's; size_px: of the pictures, 0: the checkpoint's own
    train_text, small_moments  as published the text tower learns, too, and AdamW's moments are float32
    """

    name: str
    pairs: str
    start: str
    labels_from: str = ""
    steps: int = 0
    pairs_per_call: int = 4
    accumulation: int = 16
    learning_rate: float = 0.0
    size_px: int = 0
    train_text: bool = True
    small_moments: bool = False
    resume: bool = False


def start_clip_training(request: ClipRequest) -> Job:
    """Check the request, then train in the WebUI's queue. Raises SpoError at once for what cannot work."""

    checkpoint = ready_checkpoint()
    architecture = checkpoint.architecture
    name = folders.plain_name(request.name, "the name of the model")
    if not request.pairs.strip():
        raise SpoError("The labelled pairs are missing; name a folder or parquet file in models/SPO/pairs.")
    if not request.start.strip():
        raise SpoError("The model to start from is missing; choose PickScore, or a step-aware CLIP to go on with.")
    own = {"steps": request.steps, "learning_rate": request.learning_rate}
    size_px = request.size_px or folders.usual_size_px(architecture, checkpoint.file.name)
    settings = ClipTraining(
        output=folders.preference_folder() / f"{name}.safetensors",
        width=size_px,
        height=size_px,
        pairs_per_call=request.pairs_per_call,
        accumulation=request.accumulation,
        train_text=request.train_text,
        optimizer="adamw8bit" if request.small_moments else "adamw",
        **{**PRESETS[architecture], **{name: value for name, value in own.items() if value}},
    )
    if not request.resume:
        check_output(settings)
    source = open_pairs(str(folders.labelled_pairs(request.pairs)))
    return start("preference training", name, lambda job: _train(job, request, checkpoint, settings, source))


def _train(job: Job, request: ClipRequest, checkpoint: webui.Checkpoint, settings: ClipTraining, source: Any) -> None:

    job.say("Loading the model to start from ...")
    values = {
        "checkpoint": str(checkpoint.file),
        "prompts": "pairs",
        "preference": "none",
        "output": str(settings.output),
        "width": settings.width,
        "height": settings.height,
        "clip_skip": webui.clip_skip(),
    }
    with borrowed(build_config(values, checkpoint.architecture)) as host:
        clip = starting_model(Path(folders.preference_path(request.start)), settings.seed)
        _check_memory(memory_bytes(clip, settings), settings)
        labeller = None
        if request.labels_from:
            path = folders.preference_path(request.labels_from)
            labeller = load(path, device=host.device, architecture=host.architecture)
        job.phase = "working"
        job.say(f"Training {job.name} on {len(source)} pairs.")

        def progress(now: Progress) -> None:
            job.fraction, job.eta_s, job.step = now.fraction, now.eta_s, now.step
            job.version += 1
            webui.show_progress(now.fraction, f"update {now.step} of {settings.steps}", now.eta_s)

        watcher = Watcher(progress=progress, should_stop=job.asked_to_stop, log=job.say)
        report = train_clip(clip, host, source, settings, watcher, labeller=labeller, resume=request.resume)
    if report.accuracy:
        measured, curves = report.files.accuracy, report.files.accuracy_curves
        accuracy_curves(measured, curves)
        job.table, job.picture = accuracy_table(measured), curves
    if report.finished:
        job.phase, job.fraction = "finished", 1.0
        job.say(f"Done: {settings.output.name} is in models/SPO; choose it as the preference model.")
    else:
        job.phase = "stopped"
        job.say(f"Stopped after {report.steps} updates; the same settings with Go on continue.")


def _check_memory(needed: int, settings: ClipTraining) -> None:
    """SpoError when the card is too small, before anything is moved there."""
    card = webui.card()
    needed_gib = needed / 2**30
    if card is None or needed_gib + _BESIDE_GIB <= card.total_gib:
        return
    ways = {
        "keep the text tower as it is": settings.train_text,
        "take 8-bit moments": settings.optimizer != "adamw8bit",
    }
    less = [way for way, helps in ways.items() if helps]
    advice = f"{' and '.join(less)} to need less" if less else "start from a smaller CLIP"
    raise SpoError(
        f"Training this model takes {needed_gib:.1f} GB and some {_BESIDE_GIB} GB for the rest; {card.name} has "
        f"{card.total_gib:.0f}: {advice}."
    )
