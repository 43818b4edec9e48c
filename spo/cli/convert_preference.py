"""`spo convert-preference FILE`: a preference model as .safetensors in half precision, which every torch may read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spo.files import size_text
from spo.preference.latent_reward import is_published_folder, pack_latent_reward
from spo.preference.pickles import TWIN_SUFFIX, convert


def add_convert_preference(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("convert-preference", _run, "Write a preference model as .safetensors, in half precision.")
    parser.add_argument(
        "file", type=Path, help="a .bin, .pt, .pth or .safetensors file, or a published latent reward model's folder"
    )
    parser.add_argument("--output", type=Path, help=f"the file to write (default: NAME{TWIN_SUFFIX} beside it)")
    parser.add_argument("--precision", choices=["float16", "bfloat16", "float32"], default="float16", help="of weights")
    parser.add_argument("--replace", action="store_true", help="replace an existing file")


def _run(options: argparse.Namespace) -> int:
    source: Path = options.file.expanduser()
    is_folder = is_published_folder(source)
    target = options.output or source.with_name((source.name if is_folder else source.stem) + TWIN_SUFFIX)
    write = pack_latent_reward if is_folder else convert
    write(source, target, dtype=getattr(torch, options.precision), replace=options.replace)
    before = sum(path.stat().st_size for path in (source.rglob("*") if is_folder else [source]))
    print(f"{target}  ({size_text(target.stat().st_size)}, before {size_text(before)})")
    return 0
