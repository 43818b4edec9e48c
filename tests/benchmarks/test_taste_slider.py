"""benchmarks/taste_slider.py: what a pool's two keys say, and what is made for the table."""

from __future__ import annotations

import torch

from benchmarks.taste_slider import WAYS, Way, row_of, vote_set
from spo.demo.judge import held_out
from spo.rng import generator


def pools():
    """Twelve pools of four pictures, grey to colourful in an order of their own; latents say which is which."""
    order = torch.stack([torch.randperm(4, generator=generator("pools", n)) for n in range(12)])
    pixels = torch.full((12, 4, 3, 8, 8), 128, dtype=torch.uint8)
    pixels[:, :, 0, :4] += (order * 20).byte()[:, :, None, None]
    return {"latents": order[:, :, None, None, None].float().expand(-1, -1, 4, 8, 8), "pixels": pixels}


def test_two_keys_say_five_comparisons_of_which_a_tenth_is_flipped():
    votes = vote_set(pools(), "colourful")
    assert votes.latents.shape == (60, 2, 4, 8, 8) and votes.groups == tuple(n // 5 for n in range(60))
    rank = votes.latents[:, :, 0, 0, 0]
    pairs = {tuple(sorted(pair)) for pair in rank[:5].int().tolist()}
    assert pairs == {(0, 3), (1, 3), (2, 3), (0, 1), (0, 2)}  # all but the two in the middle
    wrong = (votes.answers != (rank[:, 0] > rank[:, 1]).float()).sum()
    assert 1 <= int(wrong) <= 12
    assert 0.2 < float((rank[:, 0] > rank[:, 1]).float().mean()) < 0.8  # sides are drawn


def test_a_line_of_the_table():
    class Judge:
        def judge(self, pixels, prompts):
            assert len(pixels) == len(prompts) == len(held_out()[0])
            return type("Verdict", (), {"recognised_share": 0.75})

    base, steered = torch.zeros(64, 3, 8, 8), torch.zeros(64, 3, 8, 8)
    steered[:32, 0, :4] = 0.5
    steered[32:] = 0.0
    row = row_of("colourful", Way("choose", 8), base, steered, {"base": 2.0, "steer": 3.0, "choose_8": 5.0}, Judge())
    assert (row.kept, row.time, row.rule_before) == (0.75, 2.5, 0.0)
    assert row.wins == 0.75 and row.rule_value > 0  # half are better, half are ties
    assert len({way.name for way in WAYS}) == len(WAYS)
