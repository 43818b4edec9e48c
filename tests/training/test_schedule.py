"""Which pictures come when, and the learning rate."""

from __future__ import annotations

import pytest

from spo.config import build_config
from spo.training.schedule import batch_of, learning_rate


def test_each_epoch_goes_over_all_prompts_in_its_own_order():
    config = build_config({"prompts_per_batch": 4, "seed": 3})
    prompts = [f"prompt {i}" for i in range(10)]
    epochs = [[batch_of(3 * epoch + i, prompts, config) for i in range(3)] for epoch in range(2)]
    orders = [[prompt for told, _ in epoch for prompt in told] for epoch in epochs]
    assert [sorted(order) for order in orders] == [sorted(prompts)] * 2
    assert orders[0] != orders[1]
    seeds = [seed for epoch in epochs for _, drawn in epoch for seed in drawn]
    assert len(set(seeds)) == 20


def test_learning_rate_schedules():
    def at(step, fraction, **changes):
        settings = build_config({"learning_rate": 1.0, **changes}).optimizer
        return learning_rate(settings.learning_rate, settings.schedule, settings.warmup_steps, step, fraction)

    assert at(500, 0.5) == 1
    assert [at(step, 0.0, warmup_steps=4) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert at(9, 0.25, schedule="linear") == 0.75
    assert at(9, 0.5, schedule="cosine") == pytest.approx(0.5)
    assert at(9, 1.0, schedule="cosine") == pytest.approx(0)
