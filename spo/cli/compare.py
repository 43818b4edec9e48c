"""`spo compare`: base against LoRAs, as a grid and a table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo.checkpoint.inspect import inspect_checkpoint
from spo.cli.settings_flags import add_settings, given_values, require
from spo.config import build_config
from spo.headless.compare import compare_loras
from spo.prompts import read_prompts


def add_compare(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("compare", _run, "Make a grid: prompts x {base, LoRAs at weights}, with scores.")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE", help="a LoRA file; may be repeated")
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0], help="LoRA weights (default: 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one row for each prompt and seed")
    parser.add_argument("--limit", type=int, default=8, help="at most this many prompts (default: 8)")
    add_settings(parser, "model", "prompt", "rollout", "preference", "run.output", "run.replace")


def _run(options: argparse.Namespace) -> int:
    values = given_values(options)
    require(values, "checkpoint", "prompts", "preference", "output")
    config = build_config(values, inspect_checkpoint(Path(values["checkpoint"])).architecture)
    prompts = read_prompts(config.prompt.prompts)[: options.limit]
    print(compare_loras(config, prompts, options.seeds, [Path(path) for path in options.lora], options.weights))
    return 0
