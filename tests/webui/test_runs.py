"""Earlier runs, over a stand-in for the WebUI."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from spo.errors import SpoError
from spo.webui import folders, runs
from tests.webui import stand_in

webui = stand_in.webui


def make_run(name, step=4):
    folder = folders.run_folder(name)
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"steps": 9, "learning_rate": 0.1, "checkpoint": "/x/m.safetensors"})
    )
    (folder / "metrics.csv").write_text(f"batch,step,preference_mean,kept_share\n0,{step},1.5,0.5\n")
    (folder / "state.spo").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(folder / "samples" / "step000004.png")
    return folder


def test_a_run_is_read_and_deleted_without_what_others_put_there(webui):
    folder = make_run("mine/vivid")
    lora = folders.lora_path("mine/vivid")
    lora.parent.mkdir()
    for path in (lora, lora.with_name("vivid-step000004.safetensors"), lora.with_name("vivid-extra.safetensors")):
        path.write_bytes(b"x")
    assert folders.run_names() == ["mine/vivid"]
    run = runs.read("mine/vivid")
    assert (run.step, run.lora, [path.stem for path in run.stages]) == (4, lora, ["vivid-step000004"])
    assert re.search(r"updates\s+4 of 9", run.text())
    lora.with_name("vivid-step000007.safetensors").write_bytes(b"x")  # stopped in the middle of a batch: no row yet
    assert runs.read("mine/vivid").step == 7
    (folder / "notes.txt").write_text("mine")
    assert runs.delete("mine/vivid", lora_too=False) == 4
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert lora.exists()
    make_run("other")
    runs.delete("other", lora_too=True)
    assert folders.run_names() == []
    assert not folders.run_folder("other").exists()
    with pytest.raises(SpoError, match='no run called "other"'):
        runs.read("other")
