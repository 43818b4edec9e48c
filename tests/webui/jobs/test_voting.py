"""Voting and votes on own pictures: the session over a stand-in, the rest in a WebUI where SPO_WEBUI_DIR names one."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spo.config import build_config
from spo.errors import SpoError
from spo.preference.taste.votes import VoteFolder, VotePool, pair_id
from spo.preference.taste.waiting import WaitingPools
from spo.webui import folders, seam
from spo.webui.jobs import job, voting
from tests.webui import stand_in, started
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


def pool(seed, size=4, prompt="a fox", checkpoint="dream"):
    latents = torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).half().float()
    pictures = tuple(Image.new("RGB", (16, 16), (seed, n, 0)) for n in range(size))
    return VotePool(prompt, latents, pictures, (seed,) * size, 4, "sd15", checkpoint, "0" * 10)


def test_the_fit_beside_the_voting_gives_way_to_the_one_asked_for(no_webui, monkeypatch):
    session = session_of(no_webui, size=2)
    monkeypatch.setattr(voting, "_session", session)
    begun = []

    def fit_taste(votes, name, progress, **others):
        begun.append(name)
        if name == "mine":
            progress(0.1)
            with pytest.raises(SpoError, match="asked-for came to its end"):
                voting.fit("mine", "asked-for")
            progress(0.2)
        raise SpoError(f"{name} came to its end")

    monkeypatch.setattr(voting, "fit_taste", fit_taste)
    session.votes.add_pool(session.waiting.add(pool(1, size=2)), {(0, 1): "left"})
    session.fitting, session.message = True, ""
    session._fit()
    assert begun == ["mine", "asked-for"] and not session.fitting and session.message == ""


def session_of(no_webui, size=4):
    """A session whose thread finds nothing to do; pictures of 64 pixels."""
    config = build_config({"prompts": "p", "output": "o.safetensors", "preference": "none", "width": 64, "height": 64})
    request = voting.VotingRequest("mine", ["a fox"], size=size)
    return voting.Session(request, config, ("dream", "0" * 10))


def test_four_pictures_are_five_votes_and_one_undo(no_webui):
    session = session_of(no_webui)
    first, second = (session.waiting.add(pool(seed)) for seed in (1, 2))
    session.pool, session.ready = first, [second]
    with pytest.raises(SpoError, match="Name the best picture"):
        session.answer("left")
    with pytest.raises(SpoError, match="two different ones"):
        session.choose(1, 1)
    assert session.pool is first and not session.votes.votes()
    session.choose(3, 1)
    assert len(session.votes.votes()) == 5 and session.pool is second
    session.answer("skip")
    assert [vote.answer for vote in session.votes.votes()][5:] == ["skip"] and session.pool is None
    session.undo()
    assert session.pool is second and len(session.votes.votes()) == 5
    session.undo()
    assert session.pool is first and session.ready == [second] and not session.votes.votes()
    with pytest.raises(SpoError, match="no vote to take back"):
        session.undo()


def test_what_waits_on_disk_is_voted_on_in_the_next_session(no_webui):
    """But for what was made otherwise than would be now."""
    before = session_of(no_webui)
    for one in (pool(1), pool(2, size=2), pool(3, checkpoint="other"), pool(4, prompt="a boat"), pool(5)):
        before.waiting.add(one)
    session = session_of(no_webui)
    session.ended = True  # nothing is made
    session._work()
    assert session.pool.id == pool(1).id and [one.id for one in session.ready] == [pool(5).id]
    session.choose(0, 1)
    assert len(WaitingPools(session.votes).all(lambda one: True)) == 4


def test_starting_and_ending_do_not_wait_for_the_queue(no_webui, monkeypatch):
    """Somebody's generation holds the lock all the time."""
    checkpoint = seam.webui.Checkpoint(None, None, "dream", "0" * 10, Path("dream.safetensors"), "sd15", "epsilon", "")
    monkeypatch.setattr(job, "ready_checkpoint", lambda: checkpoint)
    monkeypatch.setattr(seam.webui, "loaded_checkpoint", lambda: checkpoint)
    with no_webui.call_queue.queue_lock:
        for _ in range(2):
            session = voting.start(voting.VotingRequest("mine", [" a fox ", ""], size=4, width=64, height=64))
            assert session.request.prompts == ["a fox"] and voting.current() is session
        voting.end(0.0)
        assert session.ended
    voting.end()
    assert not any(thread.is_alive() for thread in voting._threads)
    assert session.pool is None and not session.ready
    for wrong, message in (({"size": 1}, "accepted is 2 to 8"), ({"ahead": 10**6}, "accepted is 1 to")):
        with pytest.raises(SpoError, match=message):
            voting.start(voting.VotingRequest("mine", ["a fox"], **wrong))


@pytest.mark.parametrize(
    "name", ["../x", "con", "nul.txt", "a/b", "ends.", ".hidden", "", "x" * 300, "a:b", "\\\\host\\x"]
)
def test_names_of_votes_follow_one_rule(no_webui, name):
    with pytest.raises(SpoError, match="the name of the votes is"):
        voting.votes_folder(name)


def wait_for(what, seconds=300 if started.IS_FORK else 60):
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
    request = voting.VotingRequest("mine", ["a fox", "a boat"], from_step, 6, 5.0, started.SIZE, started.SIZE)
    session = voting.start(request)
    try:
        voted = []
        for answer in ("left", "right", "tie", "skip"):
            wait_for(lambda: session.pool is not None)
            voted.append(pair_id(session.pool.prompt, session.pool.latents))
            assert float((session.pool.latents[0] - session.pool.latents[1]).abs().max()) > 0
            session.answer(answer)
        assert [(vote.id, vote.answer) for vote in session.votes.votes()] == list(
            zip(voted, ("left", "right", "tie", "skip"), strict=True)
        )
        session.undo()
        assert session.pool.id == voted[-1]
        assert len(session.votes.votes()) == 3
    finally:
        voting.end()
    assert not any(thread.name == "spo voting" for thread in threading.enumerate())
    assert np.array_equal(host.txt2img("Euler a"), before)
    with pytest.raises(SpoError, match="at least 40"):
        voting.fit("mine", "taste")


@in_webui
def test_what_cannot_be_voted_on_is_said(models):
    host.load(started.SD15)
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
    assert folder.latents(vote.id).shape == (2, 4, started.SIZE // 8, started.SIZE // 8)
    with pytest.raises(SpoError, match="two of the same size"):
        voting.add_pictures("mine", "a fox", left, right.resize((48, 48)), "left")
    with pytest.raises(SpoError, match="prompt is missing"):
        voting.add_pictures("mine", " ", left, right, "left")


def test_a_run_that_follows_the_votes_makes_the_pictures(no_webui, monkeypatch):
    """The session shows what the run lays out, and nothing else; it ends with the run."""
    run = job.Job("training", "sub/mine", "spo")
    run.phase, run.live_votes = "working", str(voting.votes_folder("mine"))
    session = session_of(no_webui, size=2)
    session.run = run
    monkeypatch.setattr(voting, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(session, "_make_pools", lambda count: pytest.fail("made pictures beside the run"))
    session.waiting.add(pool(1, size=2))  # of the bare checkpoint
    thread = threading.Thread(target=session._work)
    thread.start()
    for seed in (2, 3):
        session.waiting.add(pool(seed, size=2, checkpoint="dream + mine"))
    wait_for(lambda: session.pool is not None and len(session.ready) == 1)
    session.answer("left")
    assert session.pool.id == pool(3, size=2).id and not session.fitting
    wait_for(lambda: not session.ready)
    run.phase = "finished"
    thread.join(10)
    assert session.ended and '"sub/mine" has ended' in session.message
    assert [vote.checkpoint_name for vote in session.votes.votes()] == ["dream + mine"]


def test_voting_beside_a_run_of_other_votes_waits_for_its_end(no_webui, monkeypatch):
    checkpoint = seam.webui.Checkpoint(None, None, "dream", "0" * 10, Path("dream.safetensors"), "sd15", "epsilon", "")
    monkeypatch.setattr(job, "ready_checkpoint", lambda: checkpoint)
    monkeypatch.setattr(seam.webui, "loaded_checkpoint", lambda: checkpoint)
    run = job.Job("training", "mine", "spo")
    run.phase, run.live_votes = "working", str(voting.votes_folder("others"))
    monkeypatch.setattr(job, "current", lambda: run)
    with pytest.raises(SpoError, match='"mine" is still going on'):
        voting.start(voting.VotingRequest("mine", ["a fox"], width=64, height=64))
    session = voting.start(voting.VotingRequest("others", ["a fox"], width=64, height=64))
    assert session.run is run
    run.phase = "finished"
    voting.end()


@pytest.mark.parametrize(("file", "px"), [("spo-demo.safetensors", 64), ("dream.safetensors", 512)])
def test_pictures_to_vote_on_have_the_checkpoints_own_size_unless_one_is_given(no_webui, monkeypatch, file, px):
    loaded = SimpleNamespace(file=Path(file), architecture="sd15")
    monkeypatch.setattr(voting.job, "ready_checkpoint", lambda: loaded)
    monkeypatch.setattr(voting.webui, "clip_skip", lambda: 1)
    for given in (0, 128):
        prompt = voting._config("mine", {"width": given, "height": 0}).prompt
        assert (prompt.width, prompt.height) == (given or px, px)
