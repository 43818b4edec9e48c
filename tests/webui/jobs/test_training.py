"""A training request and its checks, over a stand-in for the WebUI."""

from __future__ import annotations

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
