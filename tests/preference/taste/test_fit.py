"""Fitting a taste head: what votes teach, and which votes are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from spo.errors import SpoError
from spo.preference.taste.fit import accuracy_of, davidson_loss, fit_member, fit_taste, fold_of, read_vote_set
from spo.preference.taste.votes import VoteFolder, VotePool, comparisons
from tests.vote_worlds import QUICK, pair, vote_set, vote_set_by_prompt


def test_votes_that_follow_a_rule_are_learnt(fitted):
    by_timestep = {entry.timestep: entry for entry in fitted.report.accuracies if entry.scorer == "taste head"}
    assert by_timestep[1].share > 0.9 > 0.5 < by_timestep[1].low < by_timestep[1].share < by_timestep[1].high
    assert by_timestep[601].share < by_timestep[1].share
    first = fitted.report.accuracies[-1]
    assert first.scorer == "always the first" and 0.3 < first.share < 0.7
    assert fitted.head.facts.votes == 120 and fitted.head.facts.held_out_accuracy == by_timestep[1].share
    assert "timestep 401" in fitted.report.text() and "always the first" in fitted.report.text()


def test_fitting_is_a_function_of_votes_and_seed(fitted):
    again = fit_taste(vote_set(120), QUICK, name="mine")
    for name, value in again.head.members.state_dict().items():
        assert torch.equal(value, fitted.head.members.state_dict()[name])


def test_too_few_votes_are_refused():
    with pytest.raises(SpoError, match="30 votes prefer a side; at least 40 are needed"):
        fit_taste(vote_set(30), QUICK)


def test_ties_are_no_votes_that_prefer_a_side():
    votes = vote_set(60)
    votes.answers[:30] = 0.5
    with pytest.raises(SpoError, match="30 votes prefer a side"):
        fit_taste(votes, QUICK)


def test_contradictory_votes_are_refused():
    with pytest.raises(SpoError, match="The votes teach nothing.*no better than chance"):
        fit_taste(vote_set(120, truth=False), QUICK)


def test_whoever_always_says_left_is_refused():
    votes = vote_set(120)
    votes.answers[:] = 1
    with pytest.raises(SpoError, match="The votes teach nothing"):
        fit_taste(votes, QUICK)


def test_ties_are_learnt_from():
    votes = vote_set(120)
    difference = votes.latents[:, 0, 0].mean((1, 2)) - votes.latents[:, 1, 0].mean((1, 2))
    votes.answers[difference.abs() < 0.5] = 0.5
    made = fit_taste(votes, QUICK)
    assert made.report.ties > 10 and made.report.accuracies[0].share > 0.9
    assert made.report.preferring + made.report.ties == 120 == made.head.facts.votes


def test_the_loss_is_davidsons():
    d, nu = torch.tensor([0.7, 0.7, 0.7]), 0.4
    strong, weak = math.exp(0.7), 1.0  # strengths of left and right
    total = strong + weak + nu * math.sqrt(strong * weak)
    expected = [-math.log(strong / total), -math.log(nu * math.sqrt(strong * weak) / total), -math.log(weak / total)]
    found = davidson_loss(d, torch.tensor([1.0, 0.5, 0.0]), torch.tensor(math.log(nu)))
    torch.testing.assert_close(found, torch.tensor(expected))
    without = davidson_loss(d, torch.tensor([1.0, 1.0, 1.0]), torch.tensor(-100.0))
    torch.testing.assert_close(without, -d.sigmoid().log())


def test_folds_are_even():
    assert torch.bincount(fold_of(103, 5, 0)).tolist() == [21, 21, 21, 20, 20]


def test_votes_of_another_size_are_left_out(tmp_path):
    folder = VoteFolder(tmp_path)
    for number in range(3):
        folder.add(pair(number), "left")
    made = pair(5)
    wide = made.__class__(**{**made.__dict__, "latents": torch.zeros(2, 4, 8, 16)})
    folder.add(wide, "left")
    votes = read_vote_set(folder)
    assert len(votes.answers) == 3 and votes.left_out == 1


def test_another_scorer_sees_the_stored_pictures(tmp_path):
    class Brightness:
        name, needs_pixels, needs_denoised = "bright", True, True

        def score(self, candidates, prompts):
            return candidates.pixels().mean((2, 3, 4))

    folder = VoteFolder(tmp_path)
    for number in range(10):
        made = pair(number)
        bright = made.pixels.mean((1, 2, 3))
        folder.add(made, "left" if bright[0] > bright[1] else "right")
    assert accuracy_of(Brightness(), folder, read_vote_set(folder)).share == 1.0


def test_votes_that_share_pictures_are_held_out_together(tmp_path):
    folder = VoteFolder(tmp_path)
    latents = torch.stack([pair(number).latents for number in range(4)]).flatten(0, 1)
    pictures = (Image.new("RGB", (8, 8)),) * 4
    facts = ("sd15", "tiny.safetensors", "0123456789")
    for number, seeds in enumerate([(5, 5, 5, 5), (6, 7, 8, 9)]):
        pool = VotePool(
            "a cat", latents[4 * number : 4 * number + 4], pictures, seeds, 4 if number == 0 else -1, *facts
        )
        folder.add_pool(pool, comparisons(4, 0, 3))
    folder.add(pair(20), "left")  # another seed
    folder.add(pair(5, prompt="a dog"), "left")  # the first pool's seed, another prompt
    votes = read_vote_set(folder)
    assert votes.groups == (0,) * 5 + (1,) * 5 + (2, 3)
    folder = VoteFolder(tmp_path / "pairs")
    for number in range(6):
        folder.add(pair(number), "left")
    assert read_vote_set(folder).groups == tuple(range(6))


def test_small_latents_are_fitted_as_before_heads_had_a_stride():
    """The sum of a member's weights, of the version before; with another torch it may differ in the last digits."""
    votes = vote_set(120)
    network = fit_member(votes.latents, votes.answers, QUICK, 0)
    assert sum(float(value.double().sum()) for value in network.parameters()) == pytest.approx(27.0715, abs=0.02)


def test_a_head_of_large_latents_learns_the_rule():
    votes = vote_set(120)
    large = torch.nn.functional.interpolate(votes.latents.flatten(0, 1), scale_factor=4).unflatten(0, (-1, 2))
    made = fit_taste(replace(votes, latents=large), QUICK, name="large")
    assert made.head.members[0].stride == 4
    assert made.report.accuracies[0].share > 0.9
    again = fit_taste(replace(votes, latents=large), QUICK, name="large")
    same = zip(made.head.members.parameters(), again.head.members.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_a_rule_that_flips_with_the_prompt_is_learnt(reading):
    shares = {(entry.scorer, entry.timestep): entry.share for entry in reading.report.accuracies}
    assert shares["taste head", 1] > 0.8 and abs(shares["without the prompt", 1] - 0.5) < 0.15
    assert reading.report.reads_prompt and "reads the prompt" in reading.report.text()


def test_a_rule_that_does_not_flip_is_fitted_as_without_text(fitted):
    done = []
    plain = fit_taste(vote_set_by_prompt(120, flips=False), QUICK, name="mine", progress=done.append)
    assert plain.head.prompt_reader is None and not plain.report.reads_prompt
    assert plain.head.facts == fitted.head.facts
    same = zip(plain.head.members.parameters(), fitted.head.members.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert done == sorted(done) and done[0] == 0 and 0.9 < done[-1] < 1


def test_few_prompts_say_nothing_of_others():
    votes = vote_set_by_prompt(120)
    assert votes.texts is not None
    few = replace(votes, texts=votes.texts[torch.arange(120) % 2])
    with pytest.raises(SpoError, match="no better than chance"):
        fit_taste(few, QUICK)


def test_votes_carry_the_feature_of_their_prompt(tmp_path):
    folder = VoteFolder(tmp_path)
    texts = [None, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.zeros(5)]
    for number, text in enumerate(texts):
        folder.add(replace(pair(number), text=text), "left")
    votes = read_vote_set(folder)
    expected = [[2.0, 3.0], [1.0, 2.0], [3.0, 4.0], [2.0, 3.0]]  # unknown, or of another width: the mean
    assert votes.texts is not None and votes.texts.tolist() == expected
    older = VoteFolder(tmp_path / "older")
    for number in range(3):
        older.add(pair(number), "left")
    older.add(replace(pair(3), text=texts[1]), "left")
    assert read_vote_set(older).texts is None
