"""Comparing takes any host, not the headless one alone."""

from __future__ import annotations

import torch

from spo.config import build_config
from spo.headless.compare import pictures, samples
from tests.tiny_host import MeanOfChannel, TinyHost

PROMPTS = ["a fox", "a boat", "a tree"]


def test_samples_of_a_toy_host_are_scored():
    host = TinyHost(build_config({"sampling_steps": 4, "width": 64, "height": 64}))
    host.prepare(PROMPTS)
    made = samples(host, MeanOfChannel(), PROMPTS, [1, 2, 3], eta=1.0, batch=2)
    assert made.latents.shape == (3, 4, 8, 8) and made.scores.shape == (3,)
    torch.testing.assert_close(made.scores, 20.0 * made.latents[:, 0].mean((1, 2)))
    assert torch.equal(made.pixels, pictures(host, PROMPTS, [1, 2, 3], eta=1.0, batch=2))
    alone = samples(host, MeanOfChannel(), PROMPTS[2:], [3], eta=1.0)
    torch.testing.assert_close(alone.pixels, made.pixels[2:], rtol=0, atol=1e-5)
