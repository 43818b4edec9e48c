"""The step against diffusers' DDIMScheduler in float64, an oracle by other hands, and the small conversions."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.diffusion import (
    ancestral_step,
    checked_ladder,
    ddim_timesteps,
    denoised_from_output,
    network_input,
    precise,
    scaled_linear_alphas_cumprod,
    sigma_ladder,
    timestep_of_sigma,
    training_sigmas,
    transition_log_density,
    transition_mean,
)
from spo.errors import SpoError

diffusers = pytest.importorskip("diffusers")


def scheduler(prediction_type):
    made = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    made.alphas_cumprod = made.alphas_cumprod.double()
    made.final_alpha_cumprod = made.alphas_cumprod[0]
    return made


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_step_equals_ddim_in_float64(prediction_type, eta):
    ddim = scheduler(prediction_type)
    ddim.set_timesteps(20)
    levels = training_sigmas(ddim.alphas_cumprod)
    noise_of = torch.Generator().manual_seed(0)
    for timestep in ddim.timesteps.tolist():
        x_vp, output, noise = torch.randn(3, 2, 4, 8, 8, generator=noise_of, dtype=torch.float64)
        expected = ddim.step(output, timestep, x_vp, eta=eta, variance_noise=noise).prev_sample
        sigma, sigma_next = levels[timestep], levels[max(timestep - 50, 0)]
        x = x_vp * (1 + sigma**2).sqrt()
        step = ancestral_step(sigma, sigma_next, eta)
        denoised = denoised_from_output(x, output, sigma.expand(2), prediction_type)
        x_next = transition_mean(x, denoised, sigma, step.down) + step.up * noise
        torch.testing.assert_close(network_input(x_next, sigma_next.expand(2)), expected, rtol=1e-10, atol=1e-10)


def test_ladder_is_the_papers():
    alphas = scaled_linear_alphas_cumprod()
    assert ddim_timesteps(20) == list(range(951, 0, -50))
    sigmas = sigma_ladder("ddim", 20, alphas)
    assert timestep_of_sigma(sigmas, alphas).tolist() == [*range(951, 0, -50), 0]
    assert float(sigmas[-1]) == pytest.approx(0.0292, abs=1e-4)  # paper.md, quirks: sigma of alpha_bar[0]


@pytest.mark.parametrize("name", ["karras", "exponential", "uniform"])
def test_other_ladders_fall_to_zero_within_the_training_range(name):
    alphas = scaled_linear_alphas_cumprod()
    sigmas = sigma_ladder(name, 15, alphas)
    levels = training_sigmas(alphas)
    assert len(sigmas) == 16
    assert bool((sigmas[:-1] > sigmas[1:]).all())
    assert float(sigmas[0]) == pytest.approx(float(levels[-1]), rel=1e-5)
    assert float(sigmas[-2]) == pytest.approx(float(levels[0]), rel=1e-4)
    assert float(sigmas[-1]) == 0


def test_timestep_of_sigma_inverts_the_schedule_and_interpolates():
    alphas = scaled_linear_alphas_cumprod()
    levels = training_sigmas(alphas)
    assert torch.equal(timestep_of_sigma(levels, alphas), torch.arange(1000).double())
    between = (levels[500].log() * 0.75 + levels[501].log() * 0.25).exp()
    assert float(timestep_of_sigma(between[None], alphas)) == pytest.approx(500.25, abs=1e-3)
    assert timestep_of_sigma(torch.tensor([0.0, 1e6]), alphas).tolist() == [0, 999]


def test_log_density_equals_torch_normal():
    x_next, mean = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    std = torch.rand(5, dtype=torch.float64) + 0.1
    expected = torch.distributions.Normal(mean, std[:, None, None, None]).log_prob(x_next).flatten(1).mean(1)
    torch.testing.assert_close(transition_log_density(x_next, mean, std), expected, rtol=1e-10, atol=0)


def test_last_step_of_a_ladder_that_ends_at_zero_adds_no_noise():
    step = ancestral_step(0.03, 0.0, 1.0)
    assert (float(step.down), float(step.up)) == (0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigma_ladder("kerras", 20, scaled_linear_alphas_cumprod()), 'did you mean "karras"'),
        (lambda: sigma_ladder("ddim", 0, scaled_linear_alphas_cumprod()), "sampling_steps is 0"),
        (lambda: checked_ladder([1.0, 2.0]), "falling numbers"),
        (lambda: checked_ladder([3.0]), "two or more"),
        (lambda: denoised_from_output(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1), "flow"), '"flow"'),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(SpoError, match=message):
        call()


def test_float64_is_made_on_the_cpu_where_the_device_has_none():
    class OnMps(torch.Tensor):
        """Stands in for a tensor on Apple's device, which refuses float64."""

        device = torch.device("mps")

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    sigma = torch.tensor([2.0, 1.0])
    on_mps = sigma.as_subclass(OnMps)
    assert precise(on_mps).dtype == torch.float64
    assert torch.equal(precise(on_mps), sigma.double())
    step, expected = ancestral_step(on_mps, on_mps * 0.5, 1.0), ancestral_step(sigma, sigma * 0.5, 1.0)
    assert torch.equal(step.up, expected.up) and torch.equal(step.down, expected.down)
    assert torch.equal(precise(3.0), torch.tensor(3.0, dtype=torch.float64))
