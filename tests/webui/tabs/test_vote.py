"""The Vote tab: a vote counts once and for the pair that was seen; votes are listed, changed and taken back."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("gradio")

import torch
from PIL import Image

from spo.preference.taste.votes import VotePool
from spo.webui.jobs import voting
from spo.webui.tabs import page
from spo.webui.tabs import vote as vote_tab
from tests.webui import stand_in

webui = stand_in.webui


def pool_of(seed, size=2):
    latents = torch.randn(size, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    pictures = tuple(Image.new("RGB", (16, 16), (seed, n, 0)) for n in range(size))
    return VotePool("a <fox>", latents, pictures, (seed,) * size, 4, "sd15", "dream", "0" * 10)


@pytest.fixture
def session(webui, monkeypatch):
    """A session with a pair shown and one made ahead; no thread makes more."""
    session = voting.Session(voting.VotingRequest("mine", ["a <fox>"]), config=None)
    session.pool, ahead = (session.waiting.add(pool_of(seed)) for seed in (1, 2))
    session.ready = [ahead]
    monkeypatch.setattr(voting, "_session", session)
    return session


def test_without_a_session_the_page_says_what_to_do(webui, monkeypatch):
    monkeypatch.setattr(voting, "_session", None)
    assert "press Start voting" in vote_tab._shown()
    assert "Press Start voting first" in page.with_errors(vote_tab._undo)()
    assert "press Start voting" in vote_tab._vote("left")("")
    assert "press Start voting" in vote_tab._choose("", "0,1")


def test_the_pair_that_is_shown(session):
    shown = vote_tab._shown()
    assert f'data-pair="{session.pool.id}"' in shown and 'data-ready="1"' in shown
    assert shown.count("<img") == shown.count("spo-zoom") == 2 and "a &lt;fox&gt;" in shown and "<fox>" not in shown
    assert "1 made ahead" in shown
    session.pool = None
    assert 'data-ready="0"' in vote_tab._shown() and "next pictures are being made" in vote_tab._shown()


def test_a_key_pressed_twice_counts_once(session):
    first, second = session.pool.id, session.ready[0].id
    assert f'data-pair="{second}"' in vote_tab._vote("left")(first)
    assert f'data-pair="{second}"' in vote_tab._vote("left")(first)
    assert [(vote.id, vote.answer) for vote in session.votes.votes()] == [(first, "left")]
    assert f'data-pair="{first}"' in vote_tab._undo()
    assert session.votes.votes() == ()


def test_of_four_the_best_and_the_worst_are_chosen(session):
    four = session.pool = session.waiting.add(pool_of(3, size=4))
    shown = vote_tab._shown()
    assert shown.count("spo-pick") == 4 and 'data-count="4"' in shown and "Which is the best?" in shown
    for nonsense in ("", "1", "1,1", "0,9", "0,1,2", "x,y"):
        assert 'role="alert"' in vote_tab._choose(four.id, nonsense)
    assert not session.votes.votes()
    vote_tab._choose("0" * 16, "2,0")  # of pictures that are no longer shown
    assert not session.votes.votes()
    assert 'role="alert"' not in vote_tab._choose(four.id, "2,0")
    assert len(session.votes.votes()) == 5


def test_earlier_votes_are_a_wall_on_which_they_are_changed(session, monkeypatch):
    monkeypatch.setattr(vote_tab, "_ON_A_WALL", 2)
    for seed in range(5):
        session.votes.add_pool(pool_of(10 + seed), {(0, 1): "left"})
    ids = [vote.id for vote in session.votes.votes()][::-1]

    def rows(wall):
        return re.findall(r'<figure data-vote="(\w+)"', wall)

    wall = vote_tab._newest("mine")
    assert rows(wall) == ids[:2] and wall.count("<img") == 4 and wall.count('aria-pressed="true"') == 2
    assert rows(vote_tab._older("mine", ids[1])) == ids[2:4] and rows(vote_tab._older("mine", ids[3])) == ids[4:]
    wall, said = vote_tab._change("mine", f"{ids[2]},{ids[3]}", "tie")
    assert rows(wall) == ids[2:4] and "is now: tie" in said
    assert session.votes.votes()[1].answer == "tie"
    for wrong in (("mine", f"{ids[0]},0123", "tie"), ("mine", f"{ids[0]},{ids[0]}", "both"), ("../x", ",", "tie")):
        assert 'role="alert"' in vote_tab._change(*wrong)[1]
    assert 'role="alert"' in vote_tab._newest("../x") and "no earlier votes" in vote_tab._newest("nobody")


def test_two_pictures_are_needed(webui):
    own = page.with_errors(vote_tab._own("left"))
    assert "Two pictures are needed" in own("mine", "a fox", None, None)
