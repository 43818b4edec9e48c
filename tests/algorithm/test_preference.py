"""Candidates: pictures are decoded once, and only of what was predicted."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.preference import Candidates


def test_pictures_are_decoded_once_in_the_order_of_the_candidates():
    calls = []

    def decode(latents):
        calls.append(len(latents))
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    denoised = torch.randn(3, 2, 4, 8, 8)
    pool = Candidates(torch.zeros_like(denoised), 1.0, 300.0, denoised, decode)
    pixels = pool.pixels()
    assert pixels.shape == (3, 2, 3, 64, 64)
    assert torch.equal(pixels[..., ::8, ::8], denoised[:, :, :3])
    assert pool.pixels() is pixels
    assert calls == [6]


def test_what_was_not_predicted_is_not_decoded():
    pool = Candidates(torch.zeros(2, 1, 4, 8, 8), 1.0, 300.0, None, lambda latents: latents)
    with pytest.raises(ValueError, match="needs_denoised off"):
        pool.prediction()
    with pytest.raises(ValueError, match="needs_denoised off"):
        pool.pixels()
