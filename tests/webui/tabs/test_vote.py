"""The Vote tab: a vote counts once and for the pair that was seen; votes are listed, changed and taken back."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio")

import torch

from spo.preference.taste.votes import VotePair
from spo.webui.jobs import voting
from spo.webui.tabs import vote as vote_tab
from tests.webui import stand_in

webui = stand_in.webui


def pair_of(seed):
    latents, pixels = torch.full((2, 4, 2, 2), float(seed)), torch.zeros(2, 3, 16, 16)
    return VotePair("a <fox>", latents, pixels, seed, seed, 4, "sd15", "dream", "0" * 10)


@pytest.fixture
def session(webui, monkeypatch):
    """A session with one pair shown and one made ahead; no thread makes more."""
    session = voting.Session(voting.VotingRequest("mine", ["a <fox>"]), config=None)
    session.pair, session.ready = pair_of(1), [pair_of(2)]
    monkeypatch.setattr(voting, "_session", session)
    return session


def test_without_a_session_the_page_says_what_to_do(webui, monkeypatch):
    monkeypatch.setattr(voting, "_session", None)
    assert "press Start voting" in vote_tab._pair()
    assert "Press Start voting first" in vote_tab._with_errors(vote_tab._undo)()
    assert "press Start voting" in vote_tab._vote("left")("")


def test_the_pair_that_is_shown(session):
    shown = vote_tab._pair()
    assert f'data-pair="{session.pair.id}"' in shown and 'data-ready="1"' in shown
    assert shown.count("<img") == 2 and "a &lt;fox&gt;" in shown and "<fox>" not in shown
    session.pair = None
    assert 'data-ready="0"' in vote_tab._pair() and "next pair is being made" in vote_tab._pair()


def test_a_key_pressed_twice_counts_once(session):
    first, second = session.pair.id, session.ready[0].id
    assert f'data-pair="{second}"' in vote_tab._vote("left")(first)
    assert f'data-pair="{second}"' in vote_tab._vote("left")(first)
    assert [(vote.id, vote.answer) for vote in session.votes.votes()] == [(first, "left")]
    assert f'data-pair="{first}"' in vote_tab._undo()
    assert session.votes.votes() == ()


def test_earlier_votes_are_listed_shown_and_changed(session):
    first = session.pair.id
    vote_tab._vote("left")(first)
    (line,) = vote_tab._earlier("mine")["choices"]
    assert line == f"{first} · a <fox> · left"
    pictures, answer = vote_tab._show_vote("mine", line)
    assert pictures.count("<img") == 2 and answer == "left"
    assert "is now: tie" in vote_tab._change("mine", line, "tie")
    assert session.votes.votes()[0].answer == "tie"
    change = vote_tab._with_errors(vote_tab._change)
    assert "Choose a vote and its new answer first" in change("mine", None, "tie")
    assert vote_tab._earlier("../x")["choices"] == []


def test_two_pictures_are_needed(webui):
    own = vote_tab._with_errors(vote_tab._own("left"))
    assert "Two pictures are needed" in own("mine", "a fox", None, None)
