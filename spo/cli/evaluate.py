"""`spo evaluate`: base against LoRAs and stages by judges and measures, as a page and tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo.checkpoint.inspect import inspect_checkpoint
from spo.cli.settings_flags import add_settings, given_values, require
from spo.cli.several import add_gpus, launch, launches, on_own_device, processes_of_launch
from spo.config import build_config
from spo.errors import SpoError
from spo.evaluation.summary import rows_of
from spo.headless.evaluate import EvaluateRequest, evaluate, lora_files_of
from spo.prompts import read_prompts
from spo.training.processes import Processes


def add_evaluate(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("evaluate", _run, "Judge base against LoRAs on held-out prompts: one HTML page, and CSV tables.")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE", help="a LoRA file; may be repeated")
    parser.add_argument("--run", dest="runs", action="append", default=[], metavar="NAME.spo",
                        help="a run's folder: all its stages and its LoRA; may be repeated")  # fmt: skip
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0], help="LoRA weights (default: 1)")
    parser.add_argument("--judge", dest="judges", action="append", default=[], metavar="MODEL",
                        help="a preference model, demo-judge, demo-adherence or a mix; may be repeated. Take one that "
                        "training never saw")  # fmt: skip
    parser.add_argument("--distance", default="auto", metavar="auto|pixels|lpips|JUDGE",
                        help="what diversity and drift go by (default: a judge's features or pixels)")  # fmt: skip
    parser.add_argument("--scaled", type=Path, metavar="FILE",
                        help="also write the best LoRA, scaled so that weight 1 is its best weight, by the first judge "
                        "that training did not follow; an existing file is never replaced")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="these seeds for each prompt")
    parser.add_argument("--seeds-each", type=int, default=4, metavar="N",
                        help="without --seeds: so many seeds for each prompt, its own ones (default: 4)")  # fmt: skip
    parser.add_argument("--limit", type=int, default=64, help="at most this many prompts (default: 64)")
    parser.add_argument("--picture-px", type=int, default=512, help="longer side on the page (default: 512)")
    add_gpus(parser)
    add_settings(parser, "model", "prompt", "rollout", "preference.preference_precision", "run.output", "run.replace")


def _run(options: argparse.Namespace) -> int:
    if launches(options):
        return launch(options.gpus, options.arguments)
    with processes_of_launch(getattr(options, "device", "auto")) as processes:
        return _evaluate(options, processes)


def _evaluate(options: argparse.Namespace, processes: Processes) -> int:
    for name in ("limit", "seeds_each", "picture_px"):
        if getattr(options, name) < 1:
            raise SpoError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give 1 or more.")
    values = given_values(options)
    require(values, "checkpoint", "prompts", "output")
    loras = [*map(Path, options.lora), *(path for run in options.runs for path in lora_files_of(Path(run)))]
    config = build_config(values, inspect_checkpoint(Path(values["checkpoint"])).architecture)
    unique = list(dict.fromkeys(read_prompts(config.prompt.prompts)))[: options.limit]
    rows = rows_of(unique, options.seeds, options.seeds_each)
    request = EvaluateRequest(
        prompts=[prompt for prompt, _ in rows],
        seeds=[seed for _, seed in rows],
        loras=list(dict.fromkeys(loras)),
        weights=options.weights,
        judges=options.judges,
        distance=options.distance,
        scaled=options.scaled,
        largest_px=options.picture_px,
    )
    print(evaluate(on_own_device(config, processes), request, processes))
    print(f"\npage  {config.run.output}")
    return 0
