"""Tiny checkpoints for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_checkpoints import (
    write_tiny_sd15,
    write_tiny_sdxl,
)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd15(tmp_path_factory.mktemp("sd15") / "tiny.safetensors")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def pickles_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch there is: they are made here. test_convert.py tests the refusal."""
    monkeypatch.setattr("spo.checkpoint.tensor_file.FIRST_SAFE_TORCH", (2, 0))
