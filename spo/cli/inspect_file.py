"""What a file is, in a few lines: `spo inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo.checkpoint.info import describe as describe_checkpoint
from spo.checkpoint.inspect import inspect_checkpoint
from spo.checkpoint.tensor_file import open_tensor_file
from spo.errors import SpoError
from spo.lora.describe import describe as describe_lora
from spo.lora.read import read_lora
from spo.preference.load import describe_preference
from spo.preference.taste.head import describe as describe_taste
from spo.preference.taste.head import read_taste


def add_inspect(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command("inspect", _run, "Say what a LoRA, a checkpoint or a preference model is.")
    parser.add_argument("file", type=Path)


def _run(options: argparse.Namespace) -> int:
    print(describe_file(options.file))
    return 0


def describe_file(path: Path) -> str:
    """Lines about a LoRA, a checkpoint or a preference model; SpoError says what it is when it is none of these."""
    try:
        preference = describe_preference(path)
    except SpoError:
        pass  # it may be one of the other two
    else:
        is_head = preference.kind == "taste head"
        return describe_taste(read_taste(open_tensor_file(path), path.stem).facts) if is_head else preference.text()
    if path.is_dir():
        return "\n".join(describe_checkpoint(inspect_checkpoint(path)))
    try:
        lora = read_lora(path)
    except SpoError as not_a_lora:
        try:
            return "\n".join(describe_checkpoint(inspect_checkpoint(path)))
        except SpoError as not_a_checkpoint:
            known = "LoRA" in str(not_a_checkpoint)
            raise (not_a_lora if known else not_a_checkpoint) from None
    return describe_lora(lora).text()
