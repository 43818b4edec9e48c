"""The plan's memory in the tab: another process counts, its answer becomes two lines."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from spo.cli.main import main
from spo.config import build_config
from spo.preference.cnn_file import save_cnn
from spo.preference.latent_cnn import LatentCNN
from spo.webui.jobs import memory
from tests.tiny_checkpoints import write_tiny_sd15

PHASES = {"load": 2.0, "encode": 3.5, "rollout": 3.0, "decode": 4.0, "score": 3.0, "train": 5.0}
STAYS = {"text_gib": 1.5, "vae_gib": 0.25}


@pytest.fixture(autouse=True)
def forget():
    memory._counted.cache_clear()


def answered(monkeypatch, code=0, output="", error=""):
    """What the other process is asked, in a list; it answers so."""
    asked = []

    def run(command, **kwargs):
        asked.append(command)
        return subprocess.CompletedProcess(command, code, output, error)

    monkeypatch.setattr(memory.subprocess, "run", run)
    return asked


def config(**changes):
    return build_config({"checkpoint": "a.safetensors", "preference": "b.safetensors", **changes}, "sdxl")


@pytest.mark.parametrize(("card_gib", "code", "verdict"), [(12.0, 0, "fits"), (6.0, 3, "does not fit")])
def test_each_phase_against_the_card(monkeypatch, card_gib, code, verdict):
    asked = answered(monkeypatch, code, json.dumps({"phases_gib": PHASES, "precision": "float16"}))
    text = memory.memory_text(config(), ["a fox"], card_gib, **STAYS)
    # the WebUI's text encoders stay on the card; encoding and loading count them already
    assert "load 2.0, encode 3.5, rollout 4.5, decode 5.5, score 4.5, train 6.5" in text
    assert f"{card_gib:g} GiB, 1 of it for the driver: {verdict}" in text
    assert "not measured" in text and "diffusers" in text
    assert asked[0][-2:] == ["--card-gib", f"{card_gib:g}"] and "--dry-run" in asked[0]
    memory.memory_text(config(), ["a fox"], card_gib, **STAYS)
    assert len(asked) == 1  # the same question is not asked again
    memory.memory_text(config(rank=8), ["a fox"], card_gib, **STAYS)
    assert len(asked) == 2


def test_a_vae_that_would_rest_stays_in_the_webui(monkeypatch):
    answered(monkeypatch, 0, json.dumps({"phases_gib": PHASES, "precision": "float16"}))
    text = memory.memory_text(config(rest_on_cpu=True), ["a fox"], None, **STAYS)
    assert "rollout 4.8, decode 5.5, score 4.8, train 6.8" in text
    assert "card  " not in text  # none to compare with


def test_what_cannot_be_counted_is_said(monkeypatch):
    answered(monkeypatch, 2, error='spo: error\n"a.ckpt" is a pickle\n')
    assert memory.memory_text(config(), ["a fox"], 12.0, **STAYS).endswith('not counted: "a.ckpt" is a pickle')

    def late(command, **kwargs):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(memory.subprocess, "run", late)
    assert "took more than" in memory.memory_text(config(), ["a fox"], 12.0, **STAYS)


@pytest.mark.slow
def test_the_command_line_understands_the_question(monkeypatch, tmp_path, capsys):
    write_tiny_sd15(tmp_path / "tiny.safetensors")
    torch.manual_seed(0)
    save_cnn(LatentCNN(16), tmp_path / "taste.safetensors", {})
    paths = {"checkpoint": str(tmp_path / "tiny.safetensors"), "preference": str(tmp_path / "taste.safetensors")}

    def run(command, **kwargs):
        assert command[1:3] == ["-m", "spo"]
        code = main(command[3:])
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(command, code, captured.out, captured.err)

    monkeypatch.setattr(memory.subprocess, "run", run)
    asked = build_config({**paths, "output": "taken.safetensors", "width": 64, "height": 64}, "sd15")
    text = memory.memory_text(asked, ["a fox"], 12.0, text_gib=0.0, vae_gib=0.0)
    assert text.startswith("memory      ") and "in float16" in text and "fits" in text
