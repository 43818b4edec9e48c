"""Pairs wait in their order, know their prompts, and survive a stop."""

from __future__ import annotations

import torch

from spo.algorithm.pairs import Pairs
from spo.training.pending import PendingPairs


def pairs_of(images: list[int], first: int = 0) -> Pairs:
    """One pair for each image; what it holds is its number."""
    number = torch.arange(first, first + len(images), dtype=torch.float32)
    latent = number[:, None, None, None].expand(-1, 4, 2, 2).clone()
    return Pairs(
        latent, latent, latent, latent, torch.ones(len(images), dtype=torch.bool), number, number,
        torch.tensor(images), torch.zeros(len(images), dtype=torch.int64), number,
    )  # fmt: skip


def test_new_pairs_go_behind_those_that_are_left_and_keep_their_prompts():
    pending = PendingPairs()
    assert len(pending) == 0 and pending.share_done == 0
    pending.add(pairs_of([0, 1, 2]), ["fox", "boat", "pear"])
    pending.drop(2)
    assert pending.share_done == 2 / 3
    pending.add(pairs_of([1, 0], first=3), ["owl", "fox"])
    assert pending.first(9).sigma.tolist() == [2, 3, 4]
    assert [pending.prompts[i] for i in pending.first(9).image.tolist()] == ["pear", "fox", "owl"]
    assert pending.first(1).sigma.tolist() == [2]
    pending.drop(3)
    assert len(pending) == 0


def test_what_waits_survives_a_stop():
    pending, other = PendingPairs(), PendingPairs()
    other.load_state_dict(pending.state_dict())
    assert len(other) == 0
    pending.add(pairs_of([0, 1]), ["fox", "boat"])
    pending.drop(1)
    other.load_state_dict(pending.state_dict())
    assert other.first(1).sigma.tolist() == [1] and other.prompts == pending.prompts and other.of == 2
