"""A training request and its checks, over a stand-in for the WebUI."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from spo.errors import SpoError
from spo.webui import folders
from spo.webui.jobs import training
from tests.webui import stand_in

webui = stand_in.webui


def test_a_request_is_checked_before_anything_is_loaded(webui, tmp_path):
    def prepared(name="vivid", prompts=("a fox",), **settings):
        return training.prepare(training.TrainingRequest(name, prompts, {"preference": "demo", **settings}))

    made = prepared(rank=8)
    assert made.config.run.output == str(folders.lora_path("vivid"))
    assert made.config.run.run_folder == str(folders.run_folder("vivid"))
    for changes, told in (
        ({"checkpoint": "x"}, "comes from the checkpoint at the top"),
        ({"learning_rte": 1}, 'did you mean "learning_rate"'),
        ({"negative_prompt": 3}, "must be a text"),
        ({"preference": ""}, "No preference model"),
    ):
        with pytest.raises(SpoError, match=told):
            prepared(**changes)
    with pytest.raises(SpoError, match="There are no prompts"):
        prepared(prompts=["  ", ""])
    folders.lora_path("vivid").write_bytes(b"mine")
    with pytest.raises(SpoError, match="exists already"):
        prepared()
    with pytest.raises(SpoError, match="no run"):
        training.prepare(training.TrainingRequest("none", resume=True))


@pytest.mark.parametrize(("file", "px"), [(folders.DEMO_CHECKPOINT, 64), ("dream.safetensors", 512)])
def test_training_without_a_size_takes_the_checkpoints_own(webui, monkeypatch, file, px):
    loaded = SimpleNamespace(file=Path(file), architecture="sd15")
    monkeypatch.setattr(training, "ready_checkpoint", lambda: loaded)
    monkeypatch.setattr(training.webui, "refuse_training", lambda checkpoint: None)
    monkeypatch.setattr(training, "check_made_for", lambda preference, checkpoint: None)
    for given, sides in (({}, (px, px)), ({"width": 128}, (128, px))):
        request = training.TrainingRequest("vivid", ["a fox"], {"preference": "demo", **given})
        prompt = training.prepare(request).config.prompt
        assert (prompt.width, prompt.height) == sides
