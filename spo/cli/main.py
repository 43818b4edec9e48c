"""The command line: `python -m spo train`, or `spo train` once installed; `spo --help` lists the commands."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo import __version__
from spo.errors import SpoError, nearest
from spo.presets import NAMED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spo.config import Config
    from spo.progress import Progress, Watcher


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: done; 2: something the user can put right, said in one sentence; 130: stopped."""
    parser = _parser()
    try:
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            flags = [flag for action in options.parser._actions for flag in action.option_strings]
            raise SpoError(f'"{unknown[0]}" is not known to "spo {options.command}"{nearest(unknown[0], flags)}.')
        return int(options.run(options))
    except SpoError as error:
        print(f"spo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spo: stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from spo.cli.fetch_preference import add_fetch_preference
    from spo.cli.train_preference import add_train_preference

    parser = argparse.ArgumentParser("spo", description="Improve the look of your own Stable Diffusion checkpoint.")
    parser.add_argument("--version", action="version", version=f"spo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run, parser=made)
        return made

    training = command("train", _train, "Train an SPO LoRA for a checkpoint.")
    training.add_argument("--config", metavar="FILE", help="settings from a .json or .yaml file; flags win over it")
    training.add_argument(
        "--preset", choices=list(NAMED), help="a named group of settings; the config file and flags win over it"
    )
    training.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    training.add_argument("--resume", action="store_true", help="go on with the run of --output")
    _add_settings(training)

    comparing = command("compare", _compare, "Make a grid: prompts x {base, LoRAs at weights}, with scores.")
    comparing.add_argument("--lora", action="append", default=[], metavar="FILE", help="a LoRA file; may be repeated")
    comparing.add_argument("--weights", type=float, nargs="+", default=[1.0], help="LoRA weights (default: 1)")
    comparing.add_argument("--seeds", type=int, nargs="+", default=[0], help="one row for each prompt and seed")
    comparing.add_argument("--limit", type=int, default=8, help="at most this many prompts (default: 8)")
    _add_settings(comparing, "model", "prompt", "rollout", "preference", "run.output", "run.replace")

    inspecting = command("inspect", _inspect, "Say what a LoRA, a checkpoint or a preference model is.")
    inspecting.add_argument("file", type=Path)

    add_train_preference(command)
    add_fetch_preference(command)

    demo = command("demo", _demo, "Train on the small checkpoint that comes with the project, and judge the result.")
    demo.add_argument("--folder", type=Path, default=Path("demo_run"), help="where everything goes (default: demo_run)")
    demo.add_argument("--steps", type=int, default=0, help="optimizer updates (default: the demo's own)")
    demo.add_argument(
        "--install", type=Path, metavar="WEBUI", help="only put the demo checkpoint into the WebUI in this folder"
    )
    demo.add_argument(
        "--ckpt-dir", type=Path, metavar="DIR", help="with --install: the WebUI's --ckpt-dir, when it has one"
    )
    return parser


def _add_settings(parser: argparse.ArgumentParser, *wanted: str) -> None:
    """A flag for every setting, or for those of the wanted sections or "section.name"; not given: not in the result."""
    from spo.config import settings

    groups: dict[str, Any] = {}
    for setting in settings().values():
        if wanted and setting.section not in wanted and f"{setting.section}.{setting.name}" not in wanted:
            continue
        group = groups.setdefault(setting.section, parser.add_argument_group(setting.section))
        flags = list(dict.fromkeys([f"--{setting.name.replace('_', '-')}", f"--{setting.name}"]))
        text = setting.help.replace("%", "%%")
        default = "" if setting.default in ("", (), 0) else f" (default: {_shown(setting.default)})"
        extra: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": setting.name, "help": text + default}
        if setting.kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif setting.kind is list:
            extra |= {"nargs": "*", "metavar": "TEXT"}
        else:
            extra["metavar"] = "|".join(setting.choices) or setting.kind.__name__.upper()
        group.add_argument(*flags, **extra)


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user gave: the config file's, then the flags'."""
    from spo.config import read_config_file, settings
    from spo.training.loop import run_folder_of

    values: dict[str, Any] = {}
    if getattr(options, "preset", None):
        values |= NAMED[options.preset].values
    if getattr(options, "resume", False) and hasattr(options, "output"):
        saved = run_folder_of(options.output, getattr(options, "run_folder", "")) / "config.json"
        values |= read_config_file(saved) if saved.exists() else {}
    if getattr(options, "config", None):
        values |= read_config_file(options.config)
    return values | {name: value for name, value in vars(options).items() if name in settings()}


def _required(values: dict[str, Any], *names: str) -> None:
    for name in names:
        if not values.get(name):
            raise SpoError(f"--{name} is missing; give it as a flag or in the --config file.")


def _train(options: argparse.Namespace) -> int:
    from spo.checkpoint.single_file import inspect_checkpoint
    from spo.config import build_config
    from spo.headless.plan import make_plan
    from spo.prompts import read_prompts
    from spo.training.loop import check_output

    values = _given(options)
    _required(values, "checkpoint", "prompts", "preference", "output")
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
    """Load everything, train with a progress bar, draw the curves, say what came of it. 0: done, 130: stopped."""
    from spo.headless.host import load_host, load_preference
    from spo.report import compare
    from spo.training.loop import train

    host = load_host(config)
    with progress_bar() as watcher:
        preference = load_preference(config, host, watcher.log)
        report = train(host, config, prompts, preference, watcher, resume=resume)
    curves = report.run_folder / "curves.png"
    compare.curves(report.run_folder / "metrics.csv", curves)
    if report.output is None:
        print(
            f"No pair was kept in {report.steps} updates, so there is no LoRA: "
            f"lower threshold (now {config.rollout.threshold:g}) or take more prompts."
        )
        return 2 if report.finished else 130
    print(f"LoRA    {report.output}\ncurves  {curves}")
    if not report.finished:
        print(f"Stopped after {report.steps} updates. Go on with: spo train --resume --output {config.run.output}")
        return 130
    return 0


@contextmanager
def progress_bar() -> Iterator[Watcher]:
    """A watcher that shows a bar with ETA; Ctrl-C and SIGTERM mean "save and end", a second one ends at once."""
    from tqdm import tqdm

    from spo.progress import Watcher

    stop = {"asked": False}
    bar = tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar:24}| {desc}", file=sys.stderr)

    def ask(number: int, frame: object) -> None:
        if stop["asked"]:
            raise KeyboardInterrupt
        stop["asked"] = True
        bar.write("Stopping after this step; once more to stop at once.", file=sys.stderr)

    def show(progress: Progress) -> None:
        parts = [f"{progress.phase}, update {progress.step}"]
        parts += [f"{label} {progress.metrics[name]:.3g}" for name, label in SHOWN.items() if name in progress.metrics]
        if progress.eta_s is not None:
            parts.append(f"{_clock(progress.eta_s)} left")
        bar.set_description_str(", ".join(parts), refresh=False)
        bar.n = progress.fraction
        bar.refresh()

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield Watcher(
            progress=show, should_stop=lambda: stop["asked"], log=lambda text: bar.write(text, file=sys.stderr)
        )
    finally:
        bar.close()
        for number, handler in former.items():
            signal.signal(number, handler)


SHOWN = {"preference_mean": "score", "kept_share": "kept"}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _compare(options: argparse.Namespace) -> int:
    from spo.checkpoint.single_file import inspect_checkpoint
    from spo.config import build_config
    from spo.headless.compare import compare_loras
    from spo.prompts import read_prompts

    values = _given(options)
    _required(values, "checkpoint", "prompts", "preference", "output")
    config = build_config(values, inspect_checkpoint(Path(values["checkpoint"])).architecture)
    prompts = read_prompts(config.prompt.prompts)[: options.limit]
    print(compare_loras(config, prompts, options.seeds, [Path(path) for path in options.lora], options.weights))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from spo.cli.inspect_file import describe_file

    print(describe_file(options.file))
    return 0


def _demo(options: argparse.Namespace) -> int:
    if options.install:
        from spo.demo.install import install_demo, models_folder

        print(install_demo(models_folder(options.install), options.ckpt_dir).text())
        return 0
    if options.ckpt_dir:
        raise SpoError("--ckpt-dir goes with --install.")
    from spo.demo.run import run_demo

    return run_demo(options.folder, progress_bar, options.steps)


if __name__ == "__main__":
    sys.exit(main())
