"""`spo train-preference`: a taste head from votes, or a step-aware CLIP from labelled pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from spo.cli.progress_bar import progress_bar
from spo.cli.train_taste import add_taste_arguments, train_taste
from spo.errors import SpoError

_HELP = {
    "steps": "optimizer updates (default: 8000 for SD1.5, 7000 for SDXL)",
    "pairs_per_call": "pairs in one pass",
    "accumulation": "passes for one update",
    "learning_rate": "peak learning rate (default: 3e-6 for SD1.5, 1e-6 for SDXL)",
    "warmup_steps": "updates over which the learning rate rises",
    "weight_decay": "AdamW",
    "clip_norm": "clip the gradient's norm; 0: never",
    "seed": "everything random follows from it",
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
    parser.add_argument("--data", help="clip: a folder of pairs, or Pick-a-Pic's parquet files")
    parser.add_argument("--start", help="clip: PickScore to start from, or a step-aware CLIP to go on with")
    parser.add_argument("--labels-from", default="", metavar="FILE", help="take labels from this model, e.g. PickScore")
    parser.add_argument("--output", required=True, help="the .safetensors file to write")
    parser.add_argument("--resume", action="store_true", help="go on with the run of --output")
    parser.add_argument("--replace", action="store_true", help="replace an existing file and its run")
    parser.add_argument("--frozen-text", action="store_true", help="do not train the text tower")
    parser.add_argument("--width", type=int, help="of the pictures in pixels (default: 512 for SD1.5, 1024 for SDXL)")
    parser.add_argument("--height", type=int, help="likewise")
    from spo.config import settings
    from spo.training.clip import ClipTraining

    add_taste_arguments(parser)
    host = parser.add_argument_group("diffusion model")
    for name in _HOST:
        setting = settings()[name]
        host.add_argument(_flag(name), dest=name, default=argparse.SUPPRESS, type=setting.kind, help=setting.help)
    training = parser.add_argument_group("training")
    defaults = {item.name: item.default for item in fields(ClipTraining)}
    for name, text in _HELP.items():
        shown = "" if "default:" in text else f" (default: {defaults[name]})"
        training.add_argument(_flag(name), dest=name, default=argparse.SUPPRESS, type=type(defaults[name]),
                              help=text + shown)  # fmt: skip


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _run(options: argparse.Namespace) -> int:
    if options.kind == "taste":
        options.output = Path(options.output)
        options.seed = getattr(options, "seed", 0)
        return train_taste(options)
    for name in ("data", "start"):
        if not getattr(options, name):
            raise SpoError(f"--{name} is missing; a step-aware CLIP needs it.")
    return _train_clip(options)


def _train_clip(options: argparse.Namespace) -> int:
    from spo.checkpoint.single_file import inspect_checkpoint
    from spo.config import NATIVE_SIZE_PX, build_config
    from spo.headless.host import load_host
    from spo.preference.clip.accuracy import accuracy_curves, accuracy_table
    from spo.preference.clip.pair_data import open_pairs
    from spo.preference.load import load
    from spo.training.clip import PRESETS, ClipTraining, check_output, starting_model, train_clip

    given = vars(options)
    if not given.get("checkpoint"):
        raise SpoError("--checkpoint is missing: the diffusion model whose predictions shall be judged.")
    architecture = inspect_checkpoint(Path(given["checkpoint"])).architecture
    size = NATIVE_SIZE_PX[architecture]
    values = {name: given[name] for name in _HELP if name in given}
    settings = ClipTraining(
        output=Path(options.output),
        width=options.width or size,
        height=options.height or size,
        train_text=not options.frozen_text,
        replace=options.replace,
        **{**PRESETS[architecture], **values},
    )
    if not options.resume:
        check_output(settings)
    sizes = {"width": settings.width, "height": settings.height}
    config = build_config({**{name: given[name] for name in _HOST if name in given}, **sizes}, architecture)
    source = open_pairs(options.data)
    model = starting_model(Path(options.start).expanduser(), settings.seed)
    host = load_host(config)
    labeller = load(options.labels_from, device=host.device, architecture=architecture) if options.labels_from else None
    with progress_bar() as watcher:
        report = train_clip(model, host, source, settings, watcher, labeller=labeller, resume=options.resume)
    if report.accuracy:
        measured, curves = report.run_folder / "accuracy.csv", report.run_folder / "accuracy.png"
        accuracy_curves(measured, curves)
        print(f"{accuracy_table(measured)}\ncurves  {curves}")
    if not report.finished:
        print(f"Stopped after {report.steps} updates; the same command with --resume goes on.")
        return 130
    print(f"model   {report.output}")
    return 0
