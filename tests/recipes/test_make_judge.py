"""The recipe of the demo's second judge: what it is fitted to, and that it learns the rule through wrong labels."""

from __future__ import annotations

import torch

from recipes.demo_checkpoint.make_judge import accuracy, fit, unused_subjects
from spo.demo.judge import HERE, held_out
from spo.prompts import read_prompts


def test_its_subjects_are_used_nowhere_else():
    subjects = unused_subjects()
    assert len(subjects) == 83
    assert set(subjects).isdisjoint({*read_prompts(HERE / "prompts.txt"), *held_out()[0]})


def test_it_learns_the_rule_and_repeats_itself(monkeypatch):
    monkeypatch.setattr("recipes.demo_checkpoint.make_judge.BATCH", 8)
    draws = torch.Generator().manual_seed(0)
    colours = (torch.rand(4, 6, 3, 1, 1, generator=draws) * 2 - 1) * torch.rand(4, 6, 1, 1, 1, generator=draws)
    pixels = colours.expand(4, 6, 3, 16, 16)
    network = fit(pixels, 60, seed=1)
    assert accuracy(network, pixels) > 0.7
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), fit(pixels, 60, seed=1).parameters(), strict=True)
    )
