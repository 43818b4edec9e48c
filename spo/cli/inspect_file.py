"""What a file is, in a few lines: `spo inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo.checkpoint.info import describe as describe_checkpoint
from spo.checkpoint.inspect import inspect_checkpoint
from spo.checkpoint.kinds import kind_of
from spo.checkpoint.tensor_file import open_tensor_file
from spo.files import size_text
from spo.lora.describe import describe as describe_lora
from spo.lora.read import read_lora
from spo.preference.load import describe_preference, is_model_folder, recognised
from spo.preference.mix import is_mix
from spo.preference.placement import ON_CPU
from spo.preference.taste.head import describe as describe_taste
from spo.preference.taste.head import read_taste


def add_inspect(command: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """Add the command to the command line; `command(name, run, text)` makes its parser."""
    parser = command(
        "inspect", _run, "Say what a LoRA, a checkpoint, a preference model or another file of tensors is."
    )
    parser.add_argument("file", type=Path)


def _run(options: argparse.Namespace) -> int:
    print(describe_file(options.file))
    return 0


def describe_file(path: Path) -> str:
    """Lines about a LoRA, a checkpoint or a preference model; of another file of tensors, what it is.

    Raises SpoError for what is no such file, and for one of these that is damaged.
    """
    if is_mix(str(path)) or is_model_folder(path):
        return describe_preference(path).text()
    if path.is_dir():
        return "\n".join(describe_checkpoint(inspect_checkpoint(path)))
    file = open_tensor_file(path)
    if (preference := recognised(file)) is not None:
        is_head = preference.name == "taste head"
        return describe_taste(read_taste(file, path.stem, ON_CPU)) if is_head else describe_preference(path).text()
    kind = kind_of(file)
    if kind.family == "checkpoint":
        return "\n".join(describe_checkpoint(inspect_checkpoint(path)))
    if kind.family == "lora":
        return describe_lora(read_lora(path)).text()
    return (
        f"file:          {path.name}, {size_text(file.size_bytes)}, {len(file.tensors)} tensors\n"
        f"kind:          {kind.text}; SPO works with LoRAs, checkpoints and preference models"
    )
