"""`spo convert-preference`: precision, place, and what is not written over."""

from __future__ import annotations

import json

import torch

from spo.cli.main import main
from spo.files import size_text
from spo.preference.load import load
from tests.preference import test_pickles
from tests.preference.clip import test_step_aware

facts_of = test_pickles.facts_of
metadata, recorded, weights = test_step_aware.metadata, test_step_aware.recorded, test_step_aware.weights


def test_the_command_converts_any_model(tmp_path, weights, metadata, capsys):
    torch.save(weights, tmp_path / "mine.bin")
    assert main(["convert-preference", str(tmp_path / "mine.bin")]) == 0
    assert "mine.half.safetensors" in capsys.readouterr().out
    assert main(["convert-preference", str(tmp_path / "mine.bin")]) == 2
    assert "exists already" in capsys.readouterr().err
    flags = ["--output", str(tmp_path / "exact.safetensors"), "--precision", "float32"]
    assert main(["convert-preference", str(tmp_path / "mine.bin"), *flags]) == 0
    assert set(facts_of(tmp_path / "exact.safetensors")[1].values()) == {"F32"}
    (tmp_path / "config.json").write_text(json.dumps(json.loads(metadata["clip_config"])))
    assert load(tmp_path / "mine.half.safetensors").name == "mine.half"


def test_an_existing_file_is_replaced_when_asked(tmp_path, weights, capsys):
    torch.save(weights, tmp_path / "mine.bin")
    twin = tmp_path / "mine.half.safetensors"
    twin.write_bytes(b"mine")
    assert main(["convert-preference", str(tmp_path / "mine.bin")]) == 2
    assert twin.read_bytes() == b"mine"
    assert main(["convert-preference", str(tmp_path / "mine.bin"), "--replace", "--precision", "bfloat16"]) == 0
    kinds = facts_of(twin)[1]
    assert {kind for name, kind in kinds.items() if "logit_scale" not in name} == {"BF16"}
    assert f"before {size_text((tmp_path / 'mine.bin').stat().st_size)}" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_said(tmp_path, capsys):
    assert main(["convert-preference", str(tmp_path / "none.bin")]) == 2
    assert "none.bin" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
