"""Log densities, ratios, loss and gradients of 24 pairs, recorded from the published implementation."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.diffusion import (
    ancestral_step,
    denoised_from_output,
    training_sigmas,
    transition_log_density,
    transition_mean,
)
from spo.algorithm.objective import spo_loss
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

    result = spo_loss(
        policy_win - reference_win, policy_lose - reference_lose, float(recorded["beta"]), float(recorded["eps_clip"])
    )
    loss = result.loss.mean()
    loss.backward()
    assert relative_error(loss.detach(), recorded[f"{prediction_type}.loss"]) < 1e-5
    assert relative_error(output.grad, t["grad_unet_policy"]) < 1e-5
    if prediction_type == "epsilon":
        assert relative_error(result.loss, t["loss_per_pair"]) < 1e-5
        assert relative_error(result.ratio_win, t["ratio_win"]) < 1e-5
        assert relative_error(result.ratio_lose, t["ratio_lose"]) < 1e-5
