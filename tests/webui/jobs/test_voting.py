"""Voting and votes on own pictures: the session over a stand-in, the rest in a WebUI where SPO_WEBUI_DIR names one."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from spo.errors import SpoError
from spo.preference.taste.votes import VoteFolder
from spo.webui import folders
from spo.webui.jobs import voting
from tests.webui import stand_in
from tests.webui import test_host as host

webui = host.webui
no_webui = stand_in.webui
in_webui = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")


@pytest.fixture
def models(webui, tmp_path, monkeypatch):
    """models/SPO in a folder of the test's own."""
    monkeypatch.setattr(folders, "preference_folder", lambda: tmp_path / "SPO")
    return tmp_path / "SPO"


@pytest.mark.parametrize("error", [KeyError("latents"), RuntimeError("no kernel"), SpoError("at least 40 votes")])
def test_whatever_ends_a_fit_reaches_the_user_and_voting_goes_on(no_webui, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    reports = []
    no_webui.errors.report = lambda text, exc_info: reports.append(text)
    session = voting.Session(voting.VotingRequest("mine", ["a fox"]), config=None)
    session.fitting = True
    monkeypatch.setattr(voting, "read_vote_set", fails)
    session._fit()
    assert str(error) in session.message
    assert not session.fitting and not session.ended
    assert len(reports) == (not isinstance(error, SpoError))


def wait_for(what, seconds=60):
    for _ in range(seconds * 20):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("not in time")


@in_webui
@pytest.mark.parametrize(("name", "architecture"), host.CHECKPOINTS)
@pytest.mark.parametrize("from_step", [2, None])
def test_votes_are_kept_and_the_checkpoint_is_as_before(models, name, architecture, from_step):
    host.load(name)
    before = host.txt2img("Euler a")
    request = voting.VotingRequest("mine", ["a fox", "a boat"], from_step, 6, 5.0, 128, 128)
    session = voting.start(request)
    try:
        voted = []
        for answer in ("left", "right", "tie", "skip"):
            wait_for(lambda: session.pair is not None)
            voted.append(session.pair.id)
            assert float((session.pair.latents[0] - session.pair.latents[1]).abs().max()) > 0
            session.answer(answer)
        assert [(vote.id, vote.answer) for vote in session.votes.votes()] == list(
            zip(voted, ("left", "right", "tie", "skip"), strict=True)
        )
        session.undo()
        assert session.pair.id == voted[-1]
        assert len(session.votes.votes()) == 3
    finally:
        voting.end()
    assert not any(thread.name == "spo voting" for thread in threading.enumerate())
    assert np.array_equal(host.txt2img("Euler a"), before)
    with pytest.raises(SpoError, match="at least 40"):
        voting.fit("mine", "taste")


@in_webui
def test_what_cannot_be_voted_on_is_said(models):
    host.load("tiny-sd1")
    for request, told in (
        (voting.VotingRequest("../x", ["a"]), "name of the votes"),
        (voting.VotingRequest("mine", [" "]), "no prompts"),
        (voting.VotingRequest("mine", ["a"], from_step=19), "accepted is 0 to 18"),
        (voting.VotingRequest("mine", ["a"], width=65), "multiples of 8"),
    ):
        with pytest.raises(SpoError, match=told):
            voting.start(request)


@in_webui
@pytest.mark.parametrize(("name", "architecture"), host.CHECKPOINTS)
def test_two_pictures_of_ones_own(models, name, architecture):
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
