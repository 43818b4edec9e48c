"""Randomness as a function of (seed, position)."""

from __future__ import annotations

import torch

from spo.rng import SeededDraws, stable_seed


def test_stable_seed_is_the_same_everywhere_and_tells_positions_apart():
    assert stable_seed(0, "noise", 3) == 5321715615816703114
    assert len({stable_seed(1, 23), stable_seed(12, 3), stable_seed("1", 23), stable_seed(123)}) == 4


def test_draws_do_not_depend_on_the_batch():
    like = torch.zeros(3, 4, 8, 8)
    together, alone = SeededDraws([7, 8, 9]), SeededDraws([8])
    assert torch.equal(together.noise(5, 4, like)[:, 1], alone.noise(5, 4, like[:1])[:, 0])
    assert torch.equal(together.noise(5, 4, like)[:2], together.noise(5, 2, like))
    assert torch.equal(together.initial((4, 8, 8))[1], alone.initial((4, 8, 8))[0])
    assert torch.equal(together.parents(5, 4)[1:2], alone.parents(5, 4))


def test_noise_is_standard_normal_and_parents_are_uniform():
    draws = SeededDraws(range(400))
    noise = draws.noise(0, 1, torch.zeros(400, 4, 8, 8))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    counts = torch.bincount(torch.cat([draws.parents(step, 4) for step in range(5)]), minlength=4)
    assert counts.min() > 420  # of 2000, expected 500, deviation 19
