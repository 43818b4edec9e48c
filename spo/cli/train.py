"""`spo train`: from a checkpoint and prompts to a LoRA."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spo.checkpoint.inspect import inspect_checkpoint
from spo.cli.progress_bar import progress_bar
from spo.cli.settings_flags import add_settings, given_values, require
from spo.config import Config, build_config
from spo.headless.host import load_host
from spo.headless.plan import make_plan
from spo.preference.load import load_preference
from spo.presets import NAMED
from spo.prompts import read_prompts
from spo.report.curves import curves
from spo.training.loop import check_output, train


def add_train(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("train", _run, "Train an SPO LoRA for a checkpoint.")
    parser.add_argument("--config", metavar="FILE", help="settings from a .json or .yaml file; flags win over it")
    parser.add_argument(
        "--preset", choices=list(NAMED), help="a named group of settings; the config file and flags win over it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--resume", action="store_true", help="go on with the run of --output")
    add_settings(parser)


def _run(options: argparse.Namespace) -> int:
    values = given_values(options)
    require(values, "checkpoint", "prompts", "preference", "output")
    checkpoint = inspect_checkpoint(Path(values["checkpoint"]))
    config = build_config(values, checkpoint.architecture)
    prompts = read_prompts(config.prompt.prompts)
    if not options.resume:
        check_output(config)
    plan = make_plan(config, checkpoint, prompts)
    print(plan.text())
    if options.dry_run:
        return 0
    return train_headless(config, prompts, resume=options.resume)


def train_headless(config: Config, prompts: Sequence[str], *, resume: bool) -> int:
    """Load everything, train with a progress bar, draw the curves, print what came of it.

    Returns the exit code. 0: done; 2: no pool gave a pair, so that there is no LoRA; 130: stopped.
    """
    host = load_host(config)
    with progress_bar() as watcher:
        preference = load_preference(config, host.device, host.architecture, watcher.log)
        report = train(host, config, prompts, preference, watcher, resume=resume)
    picture = report.files.curves
    curves(report.files.metrics, picture)
    if report.finished and report.output is None:
        print(
            f"No pair was kept in {report.steps} updates, so there is no LoRA: "
            f"lower threshold (now {config.rollout.threshold:g}) or take more prompts."
        )
        return 2
    if report.output is not None:
        print(f"LoRA    {report.output}\ncurves  {picture}")
    if report.finished:
        return 0
    print(f"Stopped after {report.steps} updates. Go on with: spo train --resume --output {config.run.output}")
    return 130
