"""Guidance by hand, and conditioning that follows its latents."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.denoiser import Conditioning, GuidedDenoiser
from spo.algorithm.diffusion import scaled_linear_alphas_cumprod, training_sigmas

ALPHAS = scaled_linear_alphas_cumprod()


def conditioning(value, count=2):
    return Conditioning(torch.full((count, 3, 4), value))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_guidance_goes_beyond_the_conditional_output(guidance_scale):
    calls = []

    def predict(x_vp, timesteps, cond):
        calls.append((len(x_vp), timesteps.tolist()))
        return cond.cross_attention[:, 0, 0, None, None, None].expand_as(x_vp)

    x = torch.randn(2, 4, 8, 8)
    sigma = training_sigmas(ALPHAS)[[500, 20]].float()
    denoiser = GuidedDenoiser(predict, ALPHAS, "epsilon")
    denoised = denoiser(x, sigma, conditioning(1.0), conditioning(0.25), guidance_scale)
    epsilon = 0.25 + guidance_scale * (1.0 - 0.25)  # eq. 6
    torch.testing.assert_close(denoised, x - sigma[:, None, None, None] * epsilon, rtol=1e-5, atol=1e-5)
    rows = 2 if guidance_scale == 1 else 4  # one call in either case
    assert calls == [(rows, [500.0, 20.0] * (rows // 2))]


def test_rows_repeat_and_join_with_all_their_parts():
    whole = Conditioning(torch.arange(6.0).reshape(2, 3, 1), torch.arange(2.0)[:, None], torch.ones(2, 6))
    twice = whole.repeat(2)
    assert len(twice) == 4
    assert torch.equal(twice.rows([2, 3]).cross_attention, whole.cross_attention)  # candidate-major
    joined = Conditioning.cat([whole.rows([1]), whole.rows([0])])
    assert joined.pooled is not None and joined.pooled.flatten().tolist() == [1, 0]
    half = whole.to(dtype=torch.float16)
    assert half.cross_attention.dtype == torch.float16
    assert half.size_ids is not None and half.size_ids.dtype == torch.float32
    assert Conditioning.cat([conditioning(1.0)]).pooled is None
