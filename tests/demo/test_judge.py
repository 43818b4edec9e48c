"""The judge: its held-out pairs, what it says of pictures, and the win rate by the rule."""

from __future__ import annotations

import pytest
import torch

from spo.demo.judge import HERE, Judge, Judgement, held_out, taste_win_rate
from spo.demo.rule import colourfulness
from spo.prompts import read_prompts


def test_judge_and_training_share_no_prompt_and_no_seed():
    prompts, seeds = held_out()
    assert len(prompts) == len(seeds) == 64
    assert len(set(seeds)) == 64
    assert set(prompts).isdisjoint(read_prompts(HERE / "prompts.txt"))


def test_a_judgement_is_the_rule_and_whether_the_subject_is_recognised():
    judge = Judge()
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assigned = [judge.classifier.classes[index] for index in judge.classifier.assign(pixels)]
    other = next(name for name in judge.classifier.classes if name != assigned[2])
    judgement = judge.judge(pixels, [*assigned[:2], other])
    assert torch.equal(judgement.taste, colourfulness(pixels))
    assert judgement.recognised.tolist() == [True, True, False]
    assert judgement.recognised_share == pytest.approx(2 / 3)


def test_the_win_rate_goes_by_the_rule_pair_by_pair():
    recognised = torch.zeros(3, dtype=torch.bool)
    lora, base = (Judgement(torch.tensor(taste), recognised) for taste in ([1.0, 5.0, 3.0], [0.0, 6.0, 3.0]))
    rate = taste_win_rate(lora, base)
    assert (rate.wins, rate.ties, rate.losses) == (1, 1, 1)
