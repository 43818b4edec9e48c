"""Names, runs, saved settings, the status page and the job, over a stand-in for the WebUI."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from PIL import Image

from spo.errors import SpoError
from spo.presets import NAMED, preset
from spo.webui import folders, runs, saved_settings
from spo.webui.jobs import job, training
from spo.webui.jobs.job import Job, PoolPictures
from spo.webui.tabs import page
from tests.webui import stand_in

webui = stand_in.webui


@pytest.mark.parametrize(
    "name",
    [
        "", "  ", "../a", "a/../b", "/etc/a", "C:/a", "c:a", "a\\b", "con", "NUL.txt", "com1", ".hidden", "a/.b", "a.",
        "a<b", "a:b", "a|b", "a?b", "a*b", 'a"b', "a\nb", "a\x00b", "a,b", "a//b", "a/ b", "x" * 151, "日" * 100,
    ],
)  # fmt: skip
def test_names_that_leave_the_folder_or_break_prompts_are_refused(webui, name):
    with pytest.raises(SpoError, match="LoRA name"):
        folders.lora_path(name)


def test_names_and_paths_go_both_ways(webui, tmp_path):
    for name in ("vivid", "mine/vivid", "deep/er/vivid 2", "Übung"):
        path = folders.lora_path(name)
        assert path.is_relative_to((tmp_path / "Lora").resolve())
        assert folders.lora_name(path) == name
    assert folders.lora_path("vivid.safetensors") == folders.lora_path("vivid")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "Lora" / "link").symlink_to(outside)
    with pytest.raises(SpoError, match="leads out"):
        folders.lora_path("link/vivid")


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


def test_settings_are_saved_once_and_loaded_without_the_hosts_own(webui):
    saved_settings.save("my set", {"rank": 8, "learning_rate": 1e-4})
    assert saved_settings.load("my set") == {"rank": 8, "learning_rate": 1e-4}
    with pytest.raises(SpoError, match="exists already"):
        saved_settings.save("my set", {})
    with pytest.raises(SpoError, match="settings name"):
        saved_settings.save("../x", {})
    make_run("vivid")
    assert saved_settings.names() == ["my set", "run: vivid"]
    assert saved_settings.load("run: vivid") == {"steps": 9, "learning_rate": 0.1}
    with pytest.raises(SpoError, match="no settings called"):
        saved_settings.load("run: none")


def status_of(**changes):
    made = Job("training", "<b>vivid</b>", "task(spo)")
    for name, value in changes.items():
        setattr(made, name, value)
    return page.status(made)


def test_the_status_escapes_names_and_messages():
    text = status_of(message="<script>alert(1)</script>", phase="failed")
    assert "<script>" not in text
    assert "<b>vivid" not in text.replace("<b>Failed", "")
    assert 'data-live="0"' in text
    assert "Nothing is going on" in page.status(None)
    assert 'data-phase="stopping"' in status_of(phase="working", stop_wanted="save")


def test_the_pool_marks_best_worst_and_parent():
    pool = PoolPictures([Image.new("RGB", (8, 8))] * 3, [1.0, 2.0, 0.5], 1, 2, 1, True, 4, 701, 'a "fox" <1>')
    text = status_of(pool=pool, phase="working")
    assert re.findall(r'<figure class="([^"]*)"', text) == ["", "spo-best spo-goes-on", "spo-worst"]
    assert "Pool at step 5, timestep 701: kept as a pair" in text
    assert "a &quot;fox&quot; &lt;1&gt;" in text


def test_charts_draw_what_is_finite():
    drawn = page.chart("Score", [1.0, 2.0, 3.0], {"a": [1.0, float("nan"), 3.0]})
    points = re.search(r'points="([^"]*)"', drawn).group(1).split()
    assert len(points) == 2
    assert "from 1 to 3" in drawn
    assert "nan" not in drawn
    assert "polyline" in page.chart("Empty", [], {"a": []})
    assert "from 0 to 1" in page.chart("Share", [1.0], {"kept": [0.5]}, low=0, high=1)


def test_presets_are_complete_settings():
    from spo.config import build_config

    for name, found in NAMED.items():
        config = build_config({**found.values, "checkpoint": "a", "output": "b"}, found.architecture or "sd15")
        flat = config.flat()
        assert all(flat[key] == value for key, value in found.values.items()), name
    with pytest.raises(SpoError, match='did you mean "quick"'):
        preset("quik")


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


def test_one_job_at_a_time_and_how_jobs_end(webui):
    release = threading.Event()
    first = job.start("training", "first", lambda mine: release.wait(10))
    with pytest.raises(job.BusyError, match='"first" is still going on'):
        job.start("training", "second", lambda mine: None)
    release.set()
    job.end()
    assert first.phase == "finished"

    def fails(mine):
        raise SpoError("It cannot work.")

    def breaks(mine):
        raise KeyError("x")

    def waits(mine):
        release.clear()
        while not mine.asked_to_stop():
            release.wait(0.01)
        mine.phase = "stopped"

    def end_of(work):
        started = job.start("training", "one", work)
        job._thread.join(10)
        return started

    assert (end_of(fails).phase, job.current().message) == ("failed", "It cannot work.")
    assert end_of(breaks).message.startswith("KeyError")
    for how in ("save", "now"):
        started = job.start("training", "one", waits)
        job.stop(how)
        job._thread.join(10)
        assert started.phase == "stopped"
    with pytest.raises(SpoError, match="Nothing is going on"):
        job.stop("save")
    with pytest.raises(SpoError, match="accepted are save and now"):
        job.stop("later")


def test_the_bundled_prompts_are_there():
    assert len(Path(folders.BUNDLED_PROMPTS).read_text("utf-8").splitlines()) > 50
