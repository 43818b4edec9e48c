"""The Train tab: the preset that suits the checkpoint, sample pictures, files of prompts, and on to Compare."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from spo.webui import a1111, folders
from spo.webui.jobs import job
from spo.webui.jobs.job import Job
from spo.webui.tabs import form
from spo.webui.tabs import train as train_tab
from tests.webui import stand_in
from tests.webui.test_runs import make_run

webui = stand_in.webui


@pytest.mark.parametrize(
    ("now", "architecture", "file_name", "usual"),
    [
        ("", "", "", "paper-sd15"),
        ("", "sdxl", "x.safetensors", "paper-sdxl"),
        ("paper-sd15", "sdxl", "x.safetensors", "paper-sdxl"),
        ("12gb", "sdxl", "x.safetensors", "12gb"),
        ("12gb", "sd15", "spo-demo.safetensors", "demo"),
        ("demo", "sd15", "x.safetensors", "paper-sd15"),
    ],
)
def test_the_preset_follows_the_checkpoint(now, architecture, file_name, usual):
    assert train_tab._usual_preset(now, a1111.Glance(architecture, file_name)) == usual


def test_fields_become_a_request_with_the_users_edits_alone():
    filling = form.Filling("12gb", "sd15")
    fields = dict(zip(form.names(), form.preset_values("12gb", "sd15"), strict=True)) | {"beta": 7.0}
    request = train_tab._request((filling.text(), " vivid ", "a fox\na boat", ["soft"], *fields.values()))
    assert (request.name, request.prompts, request.styles) == ("vivid", ["a fox", "a boat"], ("soft",))
    assert (request.preset, request.settings["beta"]) == ("12gb", 7.0)
    assert "candidates" not in request.settings


def test_sample_pictures_are_asked_of_work_that_goes_on(webui, monkeypatch):
    current = Job("training", "vivid", "task", phase="working")
    monkeypatch.setattr(job, "_current", current)
    assert "Sample pictures come after this update" in train_tab._sample()
    assert current.sample_wanted
    monkeypatch.setattr(job, "_current", Job("training", "vivid", "task", phase="finished"))
    train_tab._sample()
    assert not job.current().sample_wanted


def test_a_file_of_prompts_fills_the_field(tmp_path):
    (tmp_path / "prompts.txt").write_text("a  red fox\na boat\n")
    assert train_tab._prompts_of_file(SimpleNamespace(name=str(tmp_path / "prompts.txt"))) == ("a red fox\na boat", "")
    _, said = train_tab._prompts_of_file(SimpleNamespace(name=str(tmp_path / "none.txt")))
    assert "spo-failed" in said and "none.txt" in said


def test_the_last_lora_goes_to_compare(webui, monkeypatch):
    nothing = train_tab.to_compare("a fox")
    assert all("value" not in update for update in nothing)
    folder = make_run("vivid")
    (folder / "config.json").write_text('{"width": 640, "height": 512}')
    output = folders.lora_path("vivid")
    output.write_bytes(b"x")
    monkeypatch.setattr(job, "_current", Job("training", "vivid", "task", phase="finished", output=output))
    loras, prompts, width, height = train_tab.to_compare("a\nb\nc\nd")
    assert (loras["value"], loras["choices"]) == (["vivid"], ["vivid"])
    assert (prompts, width["value"], height["value"]) == ("a\nb\nc", 640, 512)
