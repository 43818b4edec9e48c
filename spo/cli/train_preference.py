"""`spo train-preference`: a taste head from votes, or a step-aware CLIP from labelled pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from spo.checkpoint.inspect import inspect_checkpoint
from spo.cli.progress_bar import progress_bar
from spo.cli.several import GPUS_HELP, launch, launches, loaded, on_own_device, processes_of_launch, weights_of
from spo.cli.train_taste import train_taste
from spo.config import NATIVE_SIZE_PX, build_config, settings
from spo.errors import SpoError
from spo.files import size_text
from spo.headless.host import load_host
from spo.preference.clip.accuracy import accuracy_curves, accuracy_table
from spo.preference.clip.pair_data import open_pairs
from spo.preference.load import load
from spo.preference.taste.fit import FitSettings
from spo.training.clip import PRESETS, ClipTraining, check_output, memory_bytes, starting_model, train_clip
from spo.training.processes import Processes

_CLIP_SETTINGS = {
    "steps": "optimizer updates (default: 8000 for SD1.5, 7000 for SDXL)",
    "pairs_per_call": "pairs in one pass",
    "accumulation": "passes for one update",
    "learning_rate": "peak learning rate (default: 3e-6 for SD1.5, 1e-6 for SDXL)",
    "warmup_steps": "updates over which the learning rate rises",
    "weight_decay": "AdamW",
    "clip_norm": "clip the gradient's norm; 0: never",
    "held_out_one_in": "keep one in so many prompts to measure with; 0: none",
    "measured_pairs": "how many of their pairs to measure",
    "measure_every": "updates between measurements; 0: only before and at the end",
    "save_every": "updates between saved states; 0: only at the end",
    "label_gap": "with --labels-from: probabilities that differ by less are a tie",
    "save_precision": "of the file: float32, float16 or bfloat16",
}
_HOST = ("checkpoint", "vae", "prediction_type", "precision", "device", "negative_prompt", "guidance_scale")


def add_train_preference(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("train-preference", _run, "Make a preference model from votes, or from labelled pairs.")
    parser.add_argument(
        "--kind",
        choices=["taste", "clip"],
        default="taste",
        help="taste (the default): a small head on noisy latents, from votes; clip: the step-aware CLIP of the paper",
    )
    parser.add_argument("--output", required=True, type=Path, help="the .safetensors file to write")
    parser.add_argument("--replace", action="store_true", help="replace an existing file and its run")
    parser.add_argument(
        "--seed", type=int, default=argparse.SUPPRESS, help="everything random follows from it (default: 0)"
    )

    taste = _Flags(parser, "taste", "only with --kind taste")
    taste.add("votes", type=Path, metavar="FOLDER", help="the folder of votes")
    taste.add("against", action="append", metavar="FILE", help="another preference model to show beside it")
    taste.add("updates", type=int, help=f"optimizer updates of each member (default: {FitSettings.updates})")

    clip = _Flags(parser, "clip", "only with --kind clip")
    clip.add("data", help="a folder of pairs, or Pick-a-Pic's parquet files")
    clip.add("start", type=Path, help="PickScore to start from, or a step-aware CLIP to go on with")
    clip.add("labels_from", metavar="FILE", help="take labels from this model, e.g. PickScore")
    clip.add("gpus", type=int, metavar="N", help=GPUS_HELP)
    clip.add("resume", action="store_true", help="go on with the run of --output")
    clip.add("frozen_text", action="store_true", help="do not train the text tower")
    clip.add("optimizer", choices=("adamw", "adamw8bit"), help="adamw8bit needs bitsandbytes (default: adamw)")
    clip.add("width", type=int, help="of the pictures in pixels (default: 512 for SD1.5, 1024 for SDXL)")
    clip.add("height", type=int, help="likewise")
    for name in _HOST:
        clip.add(name, type=settings()[name].kind, help=settings()[name].help)
    defaults = {item.name: item.default for item in fields(ClipTraining)}
    for name, text in _CLIP_SETTINGS.items():
        default = "" if "default:" in text else f" (default: {defaults[name]})"
        clip.add(name, type=type(defaults[name]), help=text + default)
    parser.set_defaults(flags_of_kind={"taste": taste.names, "clip": clip.names})


class _Flags:
    """The flags of one kind, which are attributes of the options only where they were given."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, text: str) -> None:
        self.group, self.names = parser.add_argument_group(title, text), []  # type: ignore[var-annotated]

    def add(self, name: str, **how: Any) -> None:
        self.group.add_argument(_flag(name), dest=name, default=argparse.SUPPRESS, **how)
        self.names.append(name)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _run(options: argparse.Namespace) -> int:
    for kind, names in options.flags_of_kind.items():
        foreign = [_flag(name) for name in names if name in options]
        if kind != options.kind and foreign:
            raise SpoError(
                f"{foreign[0]} belongs to --kind {kind}, and --kind is {options.kind}; leave it out or change --kind."
            )
    if options.kind == "taste":
        return train_taste(options)
    if launches(options):
        return launch(options.gpus, options.arguments)
    with processes_of_launch(getattr(options, "device", "auto")) as processes:
        return _train_clip(options, processes)


def _train_clip(options: argparse.Namespace, processes: Processes) -> int:
    given = vars(options)
    for name in ("data", "start"):
        if name not in given:
            raise SpoError(f"--{name} is missing; a step-aware CLIP needs it.")
    if not given.get("checkpoint"):
        raise SpoError("--checkpoint is missing: the diffusion model whose predictions shall be judged.")
    architecture = inspect_checkpoint(Path(given["checkpoint"])).architecture
    size_px = NATIVE_SIZE_PX[architecture]
    sizes = {"width": given.get("width", size_px), "height": given.get("height", size_px)}
    training = ClipTraining(
        output=options.output,
        train_text=not given.get("frozen_text", False),
        optimizer=given.get("optimizer", "adamw"),
        replace=options.replace,
        **sizes,
        **{**PRESETS[architecture], **{name: given[name] for name in (*_CLIP_SETTINGS, "seed") if name in given}},
    )
    resume = given.get("resume", False)
    if not resume:
        check_output(training)
    config = build_config({**{name: given[name] for name in _HOST if name in given}, **sizes}, architecture)
    source = open_pairs(given["data"])
    model = starting_model(given["start"].expanduser(), training.seed)
    needed = size_text(memory_bytes(model, training))
    print(f"memory  {needed} for weights, gradients and AdamW, beside a pass and the diffusion model")
    host = loaded(lambda: load_host(on_own_device(config, processes)), weights_of(config), processes)
    labels_from = given.get("labels_from")
    labeller = load(labels_from, device=host.device, architecture=architecture) if labels_from else None
    with progress_bar(processes.index) as watcher:
        report = train_clip(
            model, host, source, training, watcher, labeller=labeller, resume=resume, processes=processes
        )
    if processes.index > 0:
        return 0 if report.finished else 130
    if report.accuracy:
        measured, curves = report.files.accuracy, report.files.accuracy_curves
        accuracy_curves(measured, curves)
        print(f"{accuracy_table(measured)}\ncurves  {curves}")
    if not report.finished:
        print(f"Stopped after {report.steps} updates; the same command with --resume goes on.")
        return 130
    print(f"model   {report.output}")
    return 0
