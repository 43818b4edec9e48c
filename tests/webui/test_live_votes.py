"""Voting on the pictures of a run while it trains, in a real WebUI."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from spo.lora.read import read_lora
from spo.preference.taste.fit import fit_taste
from spo.preference.taste.head import save_taste
from spo.training.live_taste import LiveTaste
from tests.vote_worlds import QUICK, vote_set
from tests.webui import test_host as host

webui = host.webui
pytestmark = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")
SETTINGS = {
    "width": 128, "height": 128, "sampling_steps": 5, "divert_start_step": 1, "threshold": 0.0, "prompts_per_batch": 2,
    "pairs_per_update": 2, "accumulation": 2, "steps": 30, "learning_rate": 1e-3, "save_every": 0, "rank": 4,
    "candidates": 2, "inner_steps": 0, "preference": "mine.safetensors", "live_votes": "live",
}  # fmt: skip


def test_votes_on_a_run_s_own_pictures_reach_its_head(webui, tmp_path, monkeypatch):
    from spo.webui import folders
    from spo.webui.jobs import job, training, voting

    monkeypatch.setattr(folders, "preference_folder", lambda: tmp_path / "SPO")
    monkeypatch.setattr(training, "fitted_on_device", lambda votes: fit_taste(vote_set(80), QUICK, name="new"))
    monkeypatch.setitem(LiveTaste.__init__.__kwdefaults__, "refit_every", 2)
    (tmp_path / "SPO").mkdir()
    head = fit_taste(vote_set(60), QUICK, name="mine").head
    save_taste(head, tmp_path / "SPO" / "mine.safetensors")
    monkeypatch.setattr(LiveTaste, "before_rollout", begun_with_none(LiveTaste.before_rollout))
    host.load("tiny-sd1")
    before = host.txt2img("Euler a")
    run = training.start_training(training.TrainingRequest("spo-live", ["a fox", "a boat"], SETTINGS))
    thread = job._thread
    wait_for(lambda: run.live_votes or not run.live)
    session = voting.start(voting.VotingRequest("live", ["a fox"], width=128, height=128))
    try:
        for _ in range(4):
            wait_for(lambda: session.pool is not None or not run.live)
            assert session.pool is not None, run.message
            session.answer("left")
        thread.join(400)
        assert run.phase == "finished", run.message
        votes = session.votes.votes()
        assert len(votes) == 4 and all(vote.checkpoint_name.endswith(" + spo-live") for vote in votes)
        assert any("The taste head is fitted to" in text for text in run.log), list(run.log)
        assert read_lora(folders.lora_path("spo-live")).layers
        wait_for(lambda: session.ended)
    finally:
        voting.end()
        for path in folders.lora_path("spo-live").parent.glob("spo-live*"):
            path.unlink()
    assert np.array_equal(host.txt2img("Euler a"), before)


def begun_with_none(before_rollout):
    """The head stands for one of no votes, so that the first two count."""

    def call(self, host, config, prompts, batch):
        if batch == 0:
            self.fitted_to = 0
        return before_rollout(self, host, config, prompts, batch)

    return call


def wait_for(what, seconds=300):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)
