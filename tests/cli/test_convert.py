"""`spo convert`: where the file goes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spo.cli.main import main


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": torch.arange(4.0)}, "global_step": 3}, path)
    assert main(["convert", str(path)]) == 0
    assert f"{tmp_path / 'x.safetensors'}  (0 kB)" in capsys.readouterr().out
    header = (tmp_path / "x.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}"
    assert set(json.loads(header)) == {"a", "__metadata__"}
    assert main(["convert", str(path)]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["convert", str(path), "--replace"]) == 0
    assert main(["convert", str(path), "--output", str(tmp_path / "y.ckpt")]) == 2
    assert "accepted is a name that ends in .safetensors" in capsys.readouterr().err
