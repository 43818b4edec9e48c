"""Pickles: refused where torch cannot read them safely, read where they are trusted, converted without a change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spo.checkpoint.convert import convert
from spo.checkpoint.inspect import inspect_checkpoint
from spo.checkpoint.tensor_file import open_tensor_file, reads_pickles_safely
from spo.errors import SpoError
from tests.tiny_checkpoints import write_tiny_sd15


def test_an_old_torch_reads_no_pickle_that_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_sd15(tmp_path / "x.ckpt")
    monkeypatch.setattr("spo.checkpoint.tensor_file.FIRST_SAFE_TORCH", (99, 0))
    with pytest.raises(SpoError, match=r"CVE-2026-24747; mended in 2\.10.*python run\.py convert .*x\.ckpt") as error:
        inspect_checkpoint(path)
    assert f"PyTorch {torch.__version__}" in str(error.value)
    assert open_tensor_file(path, trusted=True).is_pickle
    write_tiny_sd15(tmp_path / "x.safetensors")
    assert inspect_checkpoint(tmp_path / "x.safetensors").architecture == "sd15"


@pytest.mark.parametrize(
    ("version", "safe"),
    [("2.1.2+cu121", False), ("2.9.1", False), ("2.10.0", True), ("2.10.0a0+git1", True), ("3.0.0", True)],
)
def test_which_torch_is_safe(monkeypatch: pytest.MonkeyPatch, version: str, safe: bool) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", version)
    assert reads_pickles_safely() == safe


def test_values_are_unchanged(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "x.ckpt")
    convert(path, tmp_path / "x.safetensors")
    converted, expected = load_file(tmp_path / "x.safetensors"), torch.load(path, weights_only=True)["state_dict"]
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], value) for name, value in expected.items())


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "c": shared.view(2, 3).T}, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    converted = load_file(tmp_path / "x.safetensors")
    assert torch.equal(converted["a"], converted["b"]) and torch.equal(converted["c"], shared.view(2, 3).T)
