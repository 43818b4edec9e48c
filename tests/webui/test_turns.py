"""While a run goes on, pictures that others ask for are made between its rollouts; in a real WebUI."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from spo.lora.read import read_lora
from spo.preference import load as preference_load
from tests.tiny_host import MeanOfChannel, same_weights
from tests.webui import test_host as host

webui = host.webui
pytestmark = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")
SETTINGS = {
    "width": 128, "height": 128, "sampling_steps": 5, "divert_start_step": 1, "threshold": 0.0, "prompts_per_batch": 2,
    "pairs_per_update": 2, "accumulation": 2, "carry_pairs": True, "steps": 17, "learning_rate": 1e-2, "save_every": 0,
    "rank": 4, "preference": "demo", "candidates": 2, "inner_steps": 0, "save_precision": "float32",
}  # fmt: skip


def asked_elsewhere(make):
    """What `make` returns, made in the WebUI's queue as for a page."""
    from modules import call_queue, progress, shared

    task = progress.create_task_id("txt2img")
    progress.add_task_to_queue(task)
    with call_queue.queue_lock:
        shared.state.begin(job=task)
        progress.start_task(task)
        try:
            return make()
        finally:
            progress.finish_task(task)
            shared.state.end()


@pytest.mark.parametrize(("name", "other"), [("tiny-sd1", "tiny-sdxl"), ("tiny-sdxl", "tiny-sd1")])
def test_pictures_have_their_turn_and_the_run_ends_as_without_them(webui, monkeypatch, name, other):
    from modules import shared

    from spo.webui import folders, runs
    from spo.webui.jobs import job, training

    monkeypatch.setattr(training, "load_preference", lambda *given: MeanOfChannel())
    host.load(other)
    of_other = host.txt2img("Euler a")
    other_title = shared.opts.data["sd_model_checkpoint"]
    host.load(name)
    of_own = host.txt2img("Euler a")
    monkeypatch.setattr(preference_load, "DEMO_CHECKPOINTS", (Path(shared.sd_model.sd_checkpoint_info.filename).stem,))

    def trained(run, meanwhile=lambda: None):
        started = training.start_training(training.TrainingRequest(run, ["a fox", "a (boat:1.2)"], SETTINGS))
        thread = job._thread
        while not started.step and started.live:
            threading.Event().wait(0.05)
        meanwhile()
        thread.join(300)
        assert started.phase == "finished", started.message
        return started, read_lora(folders.lora_path(run)).layers

    def choose_other():
        shared.opts.data["sd_model_checkpoint"] = other_title  # what the list at the top does
        return host.txt2img("Euler a")

    def meanwhile():
        for make, expected in ((lambda: host.txt2img("Euler a"), of_own), (choose_other, of_other)):
            assert job.current().live
            assert np.array_equal(asked_elsewhere(make), expected)
        assert job.current().live  # it has something left to do, on its own checkpoint

    try:
        (_, alone), (turned, beside) = trained("spo-alone"), trained("spo-turns", meanwhile)
        assert same_weights(alone, beside)
        batches = [row["batch"] for row in turned.rows]
        assert batches == sorted(set(batches))
        host.load(name)
        assert np.array_equal(host.txt2img("Euler a"), of_own)
    finally:
        for run in ("spo-alone", "spo-turns"):
            if (folders.run_folder(run) / "config.json").exists():
                runs.delete(run, True)


def test_with_the_setting_off_pictures_wait_for_the_end(webui, monkeypatch):
    from modules import progress, shared

    from spo.webui import seam

    monkeypatch.setitem(progress.pending_tasks, "task(one)", 0.0)
    monkeypatch.setitem(shared.opts.data, seam.webui.TURNS, True)
    assert seam.webui.others_wait()
    monkeypatch.setitem(shared.opts.data, seam.webui.TURNS, False)
    assert not seam.webui.others_wait()
    monkeypatch.setitem(shared.opts.data, seam.webui.TURNS, True)
    progress.pending_tasks.clear()
    assert not seam.webui.others_wait()
