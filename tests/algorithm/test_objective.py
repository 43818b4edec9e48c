"""Log densities, ratios, loss and gradients of 24 pairs, recorded from the published implementation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from spo.algorithm.diffusion import (
    ancestral_step,
    denoised_from_output,
    training_sigmas,
    transition_log_density,
    transition_mean,
)
from spo.algorithm.objective import pair_loss, spo_loss
from spo.algorithm.pairs import Pairs
from tests.conftest import relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_the_published_loss(golden, prediction_type, dtype):
    recorded = golden("loss")
    t = {key.split(".", 1)[1]: value for key, value in recorded.items() if key.startswith(f"{prediction_type}.")}
    t.setdefault("alphas_cumprod", recorded["epsilon.alphas_cumprod"])
    stride = 1000 // int(recorded["num_inference_steps"])
    levels = training_sigmas(t["alphas_cumprod"])
    sigma = levels[t["timestep"]]
    sigma_next = levels[(t["timestep"] - stride).clamp(min=0)]
    step = ancestral_step(sigma, sigma_next, 1.0)
    to_ve = (1 + sigma**2).sqrt()[:, None, None, None]
    to_ve_next = (1 + sigma_next**2).sqrt()[:, None, None, None]
    x, win, lose = (
        (t["x_t"] * to_ve).to(dtype),
        (t["x_win"] * to_ve_next).to(dtype),
        (t["x_lose"] * to_ve_next).to(dtype),
    )

    def log_densities(output):
        mean = transition_mean(x, denoised_from_output(x, output, sigma, prediction_type), sigma, step.down)
        return [transition_log_density(side, mean, step.up) for side in (win, lose)]

    output = t["unet_policy"].to(dtype).requires_grad_()
    policy_win, policy_lose = log_densities(output)
    reference_win, reference_lose = log_densities(t["unet_ref"].to(dtype))
    to_vp = 0.5 * (1 + sigma_next**2).log()  # the constant between the two forms
    for name, value in {
        "logprob_policy_win": policy_win + to_vp,
        "logprob_policy_lose": policy_lose + to_vp,
        "logprob_ref_win": reference_win + to_vp,
        "logprob_ref_lose": reference_lose + to_vp,
    }.items():
        assert relative_error(value, t[name]) < 1e-5, name

    def recorded_network(output):
        return lambda x, sigma, image, step: denoised_from_output(x, output, sigma, prediction_type)

    count = len(x)
    pairs = Pairs(
        x, x, win, lose, torch.ones(count, dtype=torch.bool), sigma, sigma_next,
        torch.arange(count), torch.zeros(count, dtype=torch.long), torch.ones(count),
    )  # fmt: skip
    loss_of_ratios = partial(spo_loss, beta=float(recorded["beta"]), ratio_clamp=float(recorded["eps_clip"]))
    result = pair_loss(recorded_network(output), recorded_network(t["unet_ref"].to(dtype)), pairs, loss_of_ratios)
    loss = result.loss.mean()
    loss.backward()
    assert relative_error(loss.detach(), recorded[f"{prediction_type}.loss"]) < 1e-5
    assert relative_error(output.grad, t["grad_unet_policy"]) < 1e-5
    if prediction_type == "epsilon":
        assert relative_error(result.loss, t["loss_per_pair"]) < 1e-5
        assert relative_error(result.ratio_win, t["ratio_win"]) < 1e-5
        assert relative_error(result.ratio_lose, t["ratio_lose"]) < 1e-5


def test_log_ratios_have_their_closed_form():
    """(|x' - mu_ref|^2 - |x' - mu|^2) / (2 up^2 D), computed by hand in float64."""
    torch.manual_seed(0)
    x, win, lose, by_policy, by_reference = torch.randn(5, 3, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([10.0, 2.0, 0.5], dtype=torch.float64)
    sigma_next = sigma * 0.8
    pairs = Pairs(
        x, x, win, lose, torch.ones(3, dtype=torch.bool), sigma, sigma_next, torch.arange(3), torch.arange(3),
        torch.ones(3),
    )  # fmt: skip
    ratios = []

    def keep(log_ratio_win, log_ratio_lose):
        ratios.extend([log_ratio_win, log_ratio_lose])
        return spo_loss(log_ratio_win, log_ratio_lose, 10.0, 0.1)

    pair_loss(lambda *_: by_policy, lambda *_: by_reference, pairs, keep)
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).sqrt()
    down = (sigma_next**2 - up**2).sqrt()
    share = (down / sigma)[:, None, None, None]
    mean, mean_ref = (denoised + (x - denoised) * share for denoised in (by_policy, by_reference))
    for ratio, following in zip(ratios, (win, lose), strict=True):
        distances = (following - mean_ref).square() - (following - mean).square()
        torch.testing.assert_close(ratio, distances.flatten(1).sum(1) / (2 * up**2 * 256), rtol=1e-10, atol=1e-12)


def test_a_loss_of_its_own_is_called_with_the_ratios_of_each_side():
    pairs = Pairs(
        *torch.randn(4, 2, 4, 4, 4), torch.zeros(2, dtype=torch.bool), torch.full((2,), 2.0), torch.ones(2),
        torch.arange(2), torch.arange(2), torch.ones(2),
    )  # fmt: skip
    seen = []

    def network(x, sigma, image, step):
        seen.append((len(x), image.tolist()))
        return x * 0

    result = pair_loss(network, network, pairs, lambda win, lose: spo_loss(win, lose, 10.0, 0.1))
    assert seen == [(4, [0, 1, 0, 1])] * 2  # each side of both pairs, by reference and policy
    torch.testing.assert_close(result.loss, torch.full((2,), math.log(2)))
