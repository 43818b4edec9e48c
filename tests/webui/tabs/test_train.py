"""The Train tab: the preset that suits the checkpoint, names, the demo, sample pictures, files of prompts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio")

from spo.errors import SpoError  # noqa: E402
from spo.webui import folders, seam  # noqa: E402
from spo.webui.jobs import job, training  # noqa: E402
from spo.webui.jobs.job import Job  # noqa: E402
from spo.webui.tabs import form  # noqa: E402
from spo.webui.tabs import train as train_tab  # noqa: E402
from tests.webui import stand_in  # noqa: E402

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
    assert form.usual_preset(now, seam.webui.Glance(architecture, file_name)) == usual


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
    train_tab._sample()
    assert "Sample pictures come after this update" in current.message
    assert current.sample_wanted
    monkeypatch.setattr(job, "_current", Job("training", "vivid", "task", phase="finished"))
    train_tab._sample()
    assert not job.current().sample_wanted


def test_a_file_of_prompts_fills_the_field(webui, tmp_path):
    (tmp_path / "prompts.txt").write_text("a  red fox\na boat\n")
    assert train_tab._prompts_of_file(SimpleNamespace(name=str(tmp_path / "prompts.txt"))) == ("a red fox\na boat", "")
    _, said = train_tab._prompts_of_file(SimpleNamespace(name=str(tmp_path / "none.txt")))
    assert "spo-failed" in said and "none.txt" in said


def test_start_without_a_preference_model_says_what_to_do(webui):
    filling = form.Filling("paper-sd15", "sd15")
    fields = form.preset_values("paper-sd15", "sd15")
    said, box, text = train_tab._start(filling.text(), "vivid", "a fox", [], *fields)
    assert (said, box["visible"]) == ("", True)
    assert "There is none for SD1.5 in models/SPO" in text


def test_a_taken_name_gets_a_number_unless_the_lora_is_to_be_replaced(webui, monkeypatch):
    asked = []

    def start_training(request, in_line):
        asked.append(request)
        return Job("training", request.name, "" if request.name == "vivid" else "task")

    monkeypatch.setattr(train_tab, "start_training", start_training)
    folders.lora_path("vivid").write_bytes(b"x")
    filling = form.Filling("demo", "sd15")
    for replace in (False, True):
        fields = dict(zip(form.names(), form.preset_values("demo", "sd15"), strict=True))
        fields |= {"preference": "demo", "replace": replace}
        said = train_tab._start(filling.text(), "vivid", "a fox", [], *fields.values())[0]
        assert ("is taken" in said) is not replace
        assert ("stands in line" in said) is replace  # a job that has no task yet waits
    assert [request.name for request in asked] == ["vivid-2", "vivid"]
    monkeypatch.setattr(job, "in_line", lambda: ["vivid-2"])
    fields["replace"] = False
    train_tab._start(filling.text(), "vivid", "a fox", [], *fields.values())
    assert asked[-1].name == "vivid-3"


def test_the_demo_is_one_click(webui, monkeypatch):
    """Installed, loaded, and trained on, with its prompts in the field."""
    loaded, trained = [], []
    webui.shared.cmd_opts.ckpt_dir = ""
    monkeypatch.setattr(seam.webui, "refresh_checkpoints", lambda: None)
    monkeypatch.setattr(seam.webui, "load_checkpoint", loaded.append)
    monkeypatch.setattr(training, "_train", lambda job, prepared, resume: trained.append(prepared))
    said, box, prompts = train_tab._try_demo()
    job._thread.join(10)
    assert (said, box["visible"], loaded) == ("", False, ["spo-demo.safetensors"])
    assert (seam.webui.models_folder() / "Stable-diffusion" / "spo-demo.safetensors").exists()
    (prepared,) = trained
    assert prepared.prompts == prompts.splitlines()
    assert (prepared.config.optimizer.steps, prepared.config.preference.preference) == (60, "demo")


@pytest.mark.parametrize("takes_demo", [True, False])
def test_a_newcomer_sees_a_next_step(webui, monkeypatch, takes_demo):
    """The demo where it is taken, else the way to a run of one's own."""

    def refuse():
        raise SpoError("not here")

    monkeypatch.setattr(seam.webui, "refuse_demo", (lambda: None) if takes_demo else refuse)
    monkeypatch.setattr(seam.webui, "refresh_button", lambda *given: None)
    with gr.Blocks(analytics_enabled=False) as block:
        newcomer = train_tab.build().lists[0]
    by_id = {component.elem_id: component for component in newcomer.children if component.elem_id}
    texts = [part for part in newcomer.children if isinstance(part, gr.HTML)]
    (button,) = [part for part in block.blocks.values() if part.elem_id == "spo_try"]
    assert newcomer.visible and "spo_try" not in by_id
    assert button.visible == takes_demo
    (seen,) = [part.value for part in texts if part.visible]
    assert ("One click" in seen) == takes_demo and ("Take the bundled list" in seen) != takes_demo


def test_lists_find_a_preference_model_that_came_meanwhile(webui, monkeypatch):
    monkeypatch.setattr(folders, "usual_preference", lambda architecture, file_name: "new.safetensors")
    assert train_tab.read_lists(None)[1]["value"] == "new.safetensors"
    assert train_tab.read_lists("mine.safetensors")[1]["value"] == "mine.safetensors"
