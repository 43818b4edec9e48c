"""Runs of the command line that several tests look at."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from spo.cli.main import main
from tests.tiny_files import training_flags


@dataclass(frozen=True)
class Trained:
    """A finished run of twelve updates: its LoRA, and what was printed."""

    output: Path
    text: str


@pytest.fixture(scope="session")
def trained(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """`trained("tiny.safetensors")`: the run on that checkpoint of `tiny_files`, made when it is first asked for."""

    @cache
    def run(checkpoint: str) -> Trained:
        output = tmp_path_factory.mktemp("trained") / "loras" / "mine.safetensors"
        text = io.StringIO()
        with redirect_stdout(text):
            flags = training_flags(tiny_files, output, "--steps", "12", checkpoint=checkpoint)
            assert main(["train", *flags]) == 0
        return Trained(output, text.getvalue())

    return run


@pytest.fixture(autouse=True)
def pickles_are_read(monkeypatch):
    """In worlds with an older PyTorch, too: these files are the tests' own."""
    monkeypatch.setattr("spo.checkpoint.tensor_file.FIRST_SAFE_TORCH", (2, 0))
