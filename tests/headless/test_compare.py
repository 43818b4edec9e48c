"""Comparing takes any host, not the headless one alone."""

from __future__ import annotations

import pytest
import torch

from spo.config import build_config
from spo.errors import SpoError
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


class Tripping(TinyHost):
    """Runs out of memory at `place`, the first `times` times."""

    def __init__(self, place, times=1):
        super().__init__(build_config({"sampling_steps": 4, "width": 64, "height": 64}))
        self.place, self.times = place, times
        self.prepare(PROMPTS)

    def trip(self, place):
        if place == self.place and self.times:
            self.times -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def rollout(self, *args):
        self.trip("sample")
        return super().rollout(*args)

    def decode(self, latents):
        self.trip("decode")
        return super().decode(latents)


class TrippingTaste(MeanOfChannel):
    def __init__(self, host):
        super().__init__()
        self.host = host

    def score(self, candidates, prompts):
        self.host.trip("score")
        return super().score(candidates, prompts)


@pytest.mark.parametrize("place", ["sample", "decode", "score"])
def test_out_of_memory_in_a_comparison_halves_and_goes_on(place):
    host, healthy = Tripping(place), Tripping("nowhere")
    with pytest.warns(UserWarning, match="Out of memory: going on with pictures at a time 2"):
        made = samples(host, TrippingTaste(host), PROMPTS, [1, 2, 3], eta=1.0, batch=3)
    expected = samples(healthy, TrippingTaste(healthy), PROMPTS, [1, 2, 3], eta=1.0, batch=3)
    torch.testing.assert_close(made.pixels, expected.pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(made.scores, expected.scores)


def test_out_of_memory_with_one_picture_at_a_time_says_what_to_do():
    with pytest.warns(UserWarning), pytest.raises(SpoError, match=r"nothing left .* smaller width and height"):
        pictures(Tripping("sample", times=9), PROMPTS, [1, 2, 3], eta=1.0, batch=2)
