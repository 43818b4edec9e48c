"""Bringing latents down before the decode: sizes, agreement, and that small pictures are left alone."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.preference import Candidates
from spo.preference.small_decode import CHECKED_POOLS, SmallDecode, shrunk


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), (28, 28)), ((128, 96), (37, 28)), ((28, 28), (28, 28)), ((8, 8), (8, 8))]
)
def test_sizes(size, expected):
    assert shrunk(torch.zeros(2, 4, *size), 224).shape == (2, 4, *expected)


class Brightness:
    """The mean of the first channel, or, with `fine`, how much neighbouring pixels differ: lost by shrinking."""

    name, needs_pixels, needs_denoised = "brightness", True, True

    def __init__(self, fine=False):
        self.fine, self.sizes = fine, []

    def score(self, candidates, prompts):
        pixels = candidates.pixels()
        self.sizes.append(tuple(pixels.shape[-2:]))
        if self.fine:
            return -(pixels[..., :-8] - pixels[..., 8:]).abs().mean((2, 3, 4))
        return pixels[:, :, 0].mean((2, 3))


def pool(seed, latent_px=64):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(4, 3, 4, latent_px, latent_px, generator=generator)
    latents[:, :, 0] += torch.randn(4, 3, 1, 1, generator=generator)
    return Candidates(latents, 1.0, 300.0, latents, lambda x: x[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))


def test_the_first_pools_tell_the_agreement():
    said = []
    scorer = Brightness()
    model = SmallDecode(scorer, said.append)
    for seed in range(CHECKED_POOLS + 3):
        scores = model.score(pool(seed), ["a"] * 3)
        assert scores.shape == (4, 3)
    assert len(said) == 1
    assert "same best candidate in 100%" in said[0]
    assert scorer.sizes.count((512, 512)) == CHECKED_POOLS
    assert scorer.sizes.count((224, 224)) == CHECKED_POOLS + 3


def test_disagreement_is_told():
    said = []
    model = SmallDecode(Brightness(fine=True), said.append)
    for seed in range(CHECKED_POOLS):
        model.score(pool(seed), ["a"] * 3)
    assert "100%" not in said[0]


def test_small_pictures_are_decoded_once_and_whole():
    scorer = Brightness()
    model = SmallDecode(scorer, lambda text: pytest.fail(text))
    for seed in range(CHECKED_POOLS + 1):
        model.score(pool(seed, latent_px=16), ["a"] * 3)
    assert set(scorer.sizes) == {(128, 128)}
    assert len(scorer.sizes) == CHECKED_POOLS + 1
