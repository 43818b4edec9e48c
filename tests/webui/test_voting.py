"""Voting, votes on own pictures, and training a step-aware CLIP, in a real WebUI where SPO_WEBUI_DIR names one."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from spo.errors import SpoError
from tests.preference.clip.test_pair_data import write_folder
from tests.preference.clip.test_scores import save_folder, transformers_clip
from tests.webui import test_host as host

webui = host.webui
pytestmark = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")


@pytest.fixture
def models(webui, tmp_path, monkeypatch):
    """models/SPO in a folder of the test's own."""
    from spo.webui import folders

    monkeypatch.setattr(folders, "preference_folder", lambda: tmp_path / "SPO")
    return tmp_path / "SPO"


def wait_for(what, seconds=60):
    for _ in range(seconds * 20):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("not in time")


@pytest.mark.parametrize(("name", "architecture"), host.CHECKPOINTS)
@pytest.mark.parametrize("from_step", [2, None])
def test_votes_are_kept_and_the_checkpoint_is_as_before(models, name, architecture, from_step):
    from spo.webui.jobs import voting

    host.load(name)
    before = host.txt2img("Euler a")
    request = voting.VotingRequest("mine", ["a fox", "a boat"], from_step, 6, 5.0, 128, 128)
    session = voting.start(request)
    try:
        voted = []
        for answer in ("left", "right", "tie", "skip"):
            wait_for(lambda: session.shown is not None)
            voted.append(session.shown.id)
            assert float((session.shown.latents[0] - session.shown.latents[1]).abs().max()) > 0
            session.answer(answer)
        assert [(vote.id, vote.answer) for vote in session.votes.votes()] == list(
            zip(voted, ("left", "right", "tie", "skip"), strict=True)
        )
        session.undo()
        assert session.shown.id == voted[-1]
        assert len(session.votes.votes()) == 3
    finally:
        voting.end()
    assert not any(thread.name == "spo voting" for thread in threading.enumerate())
    assert np.array_equal(host.txt2img("Euler a"), before)
    with pytest.raises(SpoError, match="at least 40"):
        voting.fit("mine", "taste")


def test_what_cannot_be_voted_on_is_said(models):
    from spo.webui.jobs import voting

    host.load("tiny-sd1")
    for request, told in (
        (voting.VotingRequest("../x", ["a"]), "name of the votes"),
        (voting.VotingRequest("mine", [" "]), "no prompts"),
        (voting.VotingRequest("mine", ["a"], from_step=19), "accepted is 0 to 18"),
        (voting.VotingRequest("mine", ["a"], width=65), "multiples of 8"),
    ):
        with pytest.raises(SpoError, match=told):
            voting.start(request)


@pytest.mark.parametrize(("name", "architecture"), host.CHECKPOINTS)
def test_two_pictures_of_ones_own(models, name, architecture):
    from spo.preference.taste.votes import VoteFolder
    from spo.webui.jobs import voting

    host.load(name)
    left, right = (Image.fromarray(picture.astype(np.uint8)) for picture in host.txt2img("Euler a"))
    voting.add_pictures("mine", "a fox", left, right, "right")
    folder = VoteFolder(models / "votes" / "mine")
    (vote,) = folder.votes()
    assert (vote.answer, vote.prompt, vote.architecture) == ("right", "a fox", architecture)
    assert folder.latents(vote.id).shape == (2, 4, 16, 16)
    with pytest.raises(SpoError, match="two of the same size"):
        voting.add_pictures("mine", "a fox", left, right.resize((64, 64)), "left")
    with pytest.raises(SpoError, match="prompt is missing"):
        voting.add_pictures("mine", " ", left, right, "left")


def test_a_step_aware_clip_is_trained_on_the_loaded_checkpoint(models, tmp_path):
    from spo.preference.load import describe_preference
    from spo.webui.jobs import clip_training, job

    host.load("tiny-sd1")
    before = host.txt2img("Euler a")
    save_folder(transformers_clip(), tmp_path / "PickScore_v1")
    write_folder(tmp_path / "pairs", 16)
    request = clip_training.ClipRequest(
        "mine", str(tmp_path / "pairs"), str(tmp_path / "PickScore_v1"), steps=2, pairs_per_call=2, accumulation=1,
        learning_rate=1e-3, size_px=64,
    )  # fmt: skip
    started = clip_training.start_clip_training(request)
    job._thread.join(300)
    assert started.phase == "finished", started.message
    assert describe_preference(models / "mine.safetensors").kind == "step-aware CLIP"
    assert np.array_equal(host.txt2img("Euler a"), before)
    with pytest.raises(SpoError, match="exists already"):
        clip_training.start_clip_training(request)
