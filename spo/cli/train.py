"""`spo train`: from a checkpoint and prompts to a LoRA."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spo.algorithm.preference import PreferenceModel
from spo.checkpoint.inspect import inspect_checkpoint
from spo.cli.progress_bar import progress_bar
from spo.cli.settings_flags import add_settings, given_values, require
from spo.cli.several import add_gpus, launch, launches, loaded, on_own_device, processes_of_launch, weights_of
from spo.config import Config, build_config
from spo.errors import SpoError
from spo.headless.device import card_size_gib
from spo.headless.host import load_host
from spo.headless.memory_plan import count_memory
from spo.headless.plan import Plan, make_plan
from spo.preference.load import load_preference
from spo.presets import NAMED
from spo.prompts import read_prompts
from spo.report.curves import curves
from spo.training.finished_pairs import prompts_of_pairs
from spo.training.judges import load_judges, with_judges
from spo.training.live_taste import live_taste
from spo.training.loop import check_output, train
from spo.training.memory import loaded_scorer
from spo.training.processes import ALONE, Processes
from spo.training.validation import Judges


def add_train(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("train", _run, "Train an SPO LoRA for a checkpoint.")
    parser.add_argument("--config", metavar="FILE", help="settings from a .json or .yaml file; flags win over it")
    parser.add_argument(
        "--preset", choices=list(NAMED), help="a named group of settings; the config file and flags win over it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, the memory of each phase, and stop")
    parser.add_argument(
        "--card-gib",
        type=float,
        metavar="GIB",
        help="with --dry-run: plan for a CUDA card of this size in half precision; exit code 3: it is too small",
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as one JSON object")
    parser.add_argument("--resume", action="store_true", help="go on with the run of --output")
    add_gpus(parser)
    add_settings(parser)


def _run(options: argparse.Namespace) -> int:
    if not options.dry_run and launches(options):
        return launch(options.gpus, options.arguments)
    with processes_of_launch(getattr(options, "device", "auto")) as processes:
        return _train(options, processes)


def _train(options: argparse.Namespace, processes: Processes) -> int:
    values = given_values(options)
    has_pairs = values.get("method") == "dpo" and bool(values.get("pairs"))
    require(values, "checkpoint", *(() if has_pairs else ("prompts", "preference")), "output")
    checkpoint = inspect_checkpoint(Path(values["checkpoint"]))
    config = build_config(values, checkpoint.architecture)
    prompts = prompts_of_pairs(config, ()) if has_pairs else read_prompts(config.prompt.prompts)
    config = with_judges(config, checkpoint.architecture, prompts)
    if not options.resume:
        check_output(config)
    for flag in ("card_gib", "json"):
        if getattr(options, flag) and not options.dry_run:
            raise SpoError(f"--{flag.replace('_', '-')} goes with --dry-run.")
    plan = make_plan(config, checkpoint, prompts)
    if options.dry_run:
        return _dry_run(config, prompts, plan, options.card_gib, as_json=options.json)
    print(plan.text())
    return train_headless(config, prompts, resume=options.resume, processes=processes)


def _dry_run(config: Config, prompts: Sequence[str], plan: Plan, card_gib: float | None, *, as_json: bool) -> int:
    """Print the plan with the memory of each phase. 0; 3 when the card is too small.

    card_gib  of the card to plan for; None: the one that the run would use, if it uses one
    """
    if card_gib is not None and card_gib <= 0:
        raise SpoError(f"--card-gib is {card_gib:g}; accepted are sizes of a card in GiB, above 0.")
    memory = count_memory(config, prompts, on_card=card_gib is not None)
    if card_gib is None:
        card_gib = card_size_gib(config.model.device)
    else:
        plan = dataclasses.replace(plan, device="cuda", dtype=memory.precision)
    if as_json:
        facts = {"phases_gib": memory.phases_gib, "peak_gib": memory.peak_gib, "precision": memory.precision}
        fits = None if card_gib is None else memory.fits(card_gib)
        print(json.dumps({**facts, "card_gib": card_gib, "fits": fits, **dataclasses.asdict(plan)}, indent=2))
    else:
        print(f"{plan.text()}\n{memory.text(card_gib)}")
    return 3 if card_gib is not None and not memory.fits(card_gib) else 0


def train_headless(config: Config, prompts: Sequence[str], *, resume: bool, processes: Processes = ALONE) -> int:
    """Load everything, train with a progress bar, draw the curves, print what came of it.

    Returns the exit code. 0: done; 2: no pool gave a pair, so that there is no LoRA; 130: stopped.
    """
    host = loaded(lambda: load_host(on_own_device(config, processes)), weights_of(config), processes)
    with progress_bar(processes.index) as watcher:

        def load() -> tuple[PreferenceModel | None, Judges]:
            preference = None
            if config.preference.preference:
                scorer = loaded_scorer(
                    lambda: load_preference(config, host.device, host.architecture, watcher.log), watcher.log
                )
                preference = live_taste(config, scorer, say=watcher.log)
            judges = loaded_scorer(lambda: load_judges(config, host, watcher.log), watcher.log)
            return preference, judges

        preference, judges = loaded(load, weights_of(config), processes)
        report = train(host, config, prompts, preference, watcher, resume=resume, judges=judges, processes=processes)
    if processes.index > 0:
        return 0 if report.finished else 130
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
    if report.verdict:
        print(report.verdict)
    if report.finished:
        return 0
    print(f"Stopped after {report.steps} updates. Go on with: spo train --resume --output {config.run.output}")
    return 130
