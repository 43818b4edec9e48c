"""A taste head refitted while the run goes on: pictures of the policy are laid out, votes found, stops survived."""

from __future__ import annotations

import pytest
import torch

from spo.errors import SpoError
from spo.preference.taste.fit import FittedTaste, fit_taste, read_vote_set
from spo.preference.taste.votes import VoteFolder
from spo.progress import Watcher
from spo.runs.layout import RunFiles
from spo.training.live_taste import AHEAD, LiveTaste, live_taste, policy_name
from spo.training.loop import train
from tests.tiny_host import PROMPTS, MeanOfChannel, TinyHost, same_weights, small, weights_of
from tests.vote_worlds import QUICK, answer, pair, vote_set


@pytest.fixture(scope="module")
def head():
    return fit_taste(vote_set(60), QUICK, name="mine").head


def fit(votes):
    """Any votes do: what is voted on here differs by little."""
    fitted = fit_taste(vote_set(60 + len(votes.answers)), QUICK, name="again")
    return FittedTaste(fitted.head, fitted.report)


def voter(live, each=1):
    """Votes on what waits after every rollout."""

    def progress(now):
        if now.phase == "rollout":
            for pool in live.waiting.to_vote_on()[:each]:
                left = pool.latents[0].mean() > pool.latents[1].mean()
                live.votes.add_pool(pool, {(0, 1): "left" if left else "right"})

    return progress


def begun(head, config, folder, say=lambda text: None):
    live = LiveTaste(head, VoteFolder(folder), fit=fit, refit_every=2, say=say)
    live.fitted_to = 0
    return TinyHost(config), live


def configured(folder, **changes):
    return small(folder, steps=6, threshold=0.0, save_every=0, **changes)


def test_pictures_are_of_the_policy_and_the_head_follows_the_votes(head, tmp_path):
    config, log = configured(tmp_path), []
    host, live = begun(head, config, tmp_path / "votes", log.append)
    before = [value.clone() for value in live.head.members.state_dict().values()]
    report = train(host, config, PROMPTS, live, Watcher(progress=voter(live)))
    assert report.finished
    votes, waiting = live.votes.votes(), live.waiting.to_vote_on()
    assert len(votes) >= 2 and 0 < len(waiting) <= AHEAD
    assert {vote.checkpoint_name for vote in votes} == {policy_name("tiny.safetensors", "taste")}
    assert live.fitted_to == len(votes) // 2 * 2 and any("is fitted to 2 votes" in text for text in log)
    assert not all(torch.equal(a, b) for a, b in zip(before, live.head.members.state_dict().values(), strict=True))
    assert live.head.name == "mine"

    # the last pictures of the run are not those of the bare checkpoint
    pool = waiting[-1]
    bare = TinyHost(config)
    plain = bare.latents([pool.prompt], [pool.seeds[0]])
    assert not any(torch.allclose(plain[0].half().float(), one, atol=1e-3) for one in pool.latents)


def test_a_run_that_is_stopped_anywhere_ends_in_the_same_lora(head, tmp_path):
    """Its head comes back with it, and the votes that were given before are there."""
    whole = configured(tmp_path / "whole")
    host, live = begun(head, whole, tmp_path / "whole" / "votes")
    expected = train(host, whole, PROMPTS, live, Watcher(progress=voter(live)))

    parts, reports = configured(tmp_path / "parts"), []
    while not reports or not reports[-1].finished:
        host, live = begun(head, parts, tmp_path / "parts" / "votes")
        watcher = Watcher(progress=voter(live), make_way=lambda: True)
        reports.append(train(host, parts, PROMPTS, live, watcher, resume=bool(reports)))
    assert len(reports) > 2
    assert same_weights(weights_of(reports[-1].output), weights_of(expected.output))


def test_a_killed_run_goes_on_with_the_head_of_its_state(head, tmp_path):
    """The state is saved with every new head, so the votes before it are never judged by an older one again."""
    whole, parts = configured(tmp_path / "whole"), configured(tmp_path / "parts")
    host, live = begun(head, whole, tmp_path / "whole" / "votes")
    expected = train(host, whole, PROMPTS, live, Watcher(progress=voter(live)))

    class Killed(BaseException):
        pass

    host, live = begun(head, parts, tmp_path / "parts" / "votes")
    vote = voter(live)

    def progress(now):
        if live.fitted_to and now.phase == "training":
            raise Killed
        vote(now)

    with pytest.raises(Killed):
        train(host, parts, PROMPTS, live, Watcher(progress=progress))
    fitted_to = live.fitted_to
    host, live = begun(head, parts, tmp_path / "parts" / "votes")
    assert RunFiles.of(parts.run.output).state.exists()
    report = train(host, parts, PROMPTS, live, Watcher(progress=voter(live, each=0)), resume=True)
    assert live.fitted_to == fitted_to and report.finished and expected.finished


def test_votes_that_teach_nothing_leave_the_head(head, tmp_path):
    log = []
    folder = VoteFolder(tmp_path / "votes")
    for number in range(45):
        folder.add(pair(number), "left" if number % 2 else "right")
    config = configured(tmp_path)
    live = LiveTaste(head, folder, fit=lambda votes: fit_taste(votes, QUICK), say=log.append)
    live.fitted_to = 0
    before = live.head
    assert not live.before_rollout(_prepared(config), config, PROMPTS, 0)
    assert live.head is before and "stays as it is. The votes teach nothing" in log[0]
    assert not live.before_rollout(_prepared(config), config, PROMPTS, 1) and len(log) == 1
    assert live.fitted_to == len(read_vote_set(folder).answers) == 45


def test_votes_by_a_taste_refit_the_head(head, tmp_path):
    folder = VoteFolder(tmp_path / "votes")
    for number in range(70):
        folder.add(pair(number), answer(pair(number)))
    config = configured(tmp_path)
    live = LiveTaste(head, folder, fit=lambda votes: fit_taste(votes, QUICK))
    assert live.before_rollout(_prepared(config), config, PROMPTS, 0)
    assert live.head.facts.votes == live.fitted_to == 70


def test_a_head_is_needed_to_begin_with(head, tmp_path):
    config = configured(tmp_path, live_votes=str(tmp_path / "votes"))
    assert isinstance(live_taste(config, head), LiveTaste)
    with pytest.raises(SpoError, match="needs a taste head to begin with"):
        live_taste(config, MeanOfChannel())
    assert live_taste(configured(tmp_path), head) is head


def test_the_state_of_another_head_is_refused(head, tmp_path):
    live = LiveTaste(head, VoteFolder(tmp_path))
    with pytest.raises(SpoError, match="of another size"):
        live.load_state_dict({"fitted_to": 1, "members": {}})


def _prepared(config):
    host = TinyHost(config)
    host.prepare(PROMPTS)
    return host
