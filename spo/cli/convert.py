"""`spo convert FILE`: a checkpoint or VAE that is a pickle as .safetensors, which every torch may read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo.checkpoint.convert import convert
from spo.files import size_text


def add_convert(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("convert", _run, "Write a .ckpt, .pt or .bin file of tensors as .safetensors, values unchanged.")
    parser.add_argument("file", type=Path, help="a checkpoint or VAE; for preference models see convert-preference")
    parser.add_argument("--output", type=Path, help="the file to write (default: NAME.safetensors beside it)")
    parser.add_argument("--replace", action="store_true", help="replace an existing file")


def _run(options: argparse.Namespace) -> int:
    source: Path = options.file.expanduser()
    target = options.output or source.with_suffix(".safetensors")
    convert(source, target, replace=options.replace)
    print(f"{target}  ({size_text(target.stat().st_size)})")
    return 0
