"""`spo demo`: the demonstration, or its checkpoint put into a WebUI."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo.cli.progress_bar import progress_bar
from spo.demo.install import install_demo, models_folder
from spo.demo.run import run_demo
from spo.errors import SpoError


def add_demo(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("demo", _run, "Train on the small checkpoint that comes with the project, and judge the result.")
    parser.add_argument(
        "--folder", type=Path, default=Path("demo_run"), help="where everything goes (default: demo_run)"
    )
    parser.add_argument("--steps", type=int, default=0, help="optimizer updates (default: the demo's own)")
    parser.add_argument(
        "--install", type=Path, metavar="WEBUI", help="only put the demo checkpoint into the WebUI in this folder"
    )
    parser.add_argument(
        "--ckpt-dir", type=Path, metavar="DIR", help="with --install: the WebUI's --ckpt-dir, when it has one"
    )


def _run(options: argparse.Namespace) -> int:
    if options.install:
        print(install_demo(models_folder(options.install), options.ckpt_dir).text())
        return 0
    if options.ckpt_dir:
        raise SpoError("--ckpt-dir goes with --install.")
    return run_demo(options.folder, progress_bar, options.steps)
