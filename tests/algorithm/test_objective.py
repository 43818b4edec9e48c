"""Log densities, ratios, loss and gradients of 24 pairs, recorded from the published implementation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from spo.algorithm.diffusion import (
    ancestral_step,
    ddim_timesteps,
    denoised_from_output,
    scaled_linear_alphas_cumprod,
    sigma_ladder,
    training_sigmas,
    transition_log_density,
    transition_mean,
)
from spo.algorithm.objective import (
    STEP_WEIGHTS,
    Refinements,
    dpo_loss,
    losing_share,
    pair_loss,
    shift_loss,
    spo_loss,
    step_factor,
    transition_noise,
)
from spo.algorithm.pairs import Pairs
from spo.errors import SpoError
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


# ---- what later papers change


def shared_pairs(x, win, lose, sigma, sigma_next):
    count = len(x)
    return Pairs(
        x, x, win, lose, torch.ones(count, dtype=torch.bool), sigma, sigma_next, torch.arange(count),
        torch.arange(count), torch.ones(count),
    )  # fmt: skip


def ratios_of(policy, reference, pairs, refinements):
    """(log r_w, log r_l) that the loss is given."""
    seen = []

    def keep(log_ratio_win, log_ratio_lose):
        seen.extend([log_ratio_win, log_ratio_lose])
        return dpo_loss(log_ratio_win, log_ratio_lose, 1.0)

    pair_loss(policy, reference, pairs, keep, refinements=refinements)
    return seen


def test_the_weight_of_a_step_has_its_closed_form_on_the_papers_ladder():
    """log r_w - log r_l = -w <eps_policy - eps_reference, z_w - z_l> / D, w replaced by the factor, in float64."""
    sigmas = sigma_ladder("ddim", 20, scaled_linear_alphas_cumprod()).double()
    sigma, sigma_next, count = sigmas[:-1], sigmas[1:], 20
    torch.manual_seed(0)
    x, z_win, z_lose, eps_policy, eps_reference = torch.randn(5, count, 4, 8, 8, dtype=torch.float64)
    step = ancestral_step(sigma, sigma_next, 1.0)
    column = sigma[:, None, None, None]
    middle = transition_mean(x, x - column * 0.3, sigma, step.down)  # of the policy that sampled: any
    up = step.up[:, None, None, None]
    pairs = shared_pairs(x, middle + up * z_win, middle + up * z_lose, sigma, sigma_next)
    weights = {
        "paper": (sigma - step.down) / step.up,
        "gradspo": sigma / (1 + sigma**2).sqrt(),
        "equal": torch.ones(count, dtype=torch.float64),
    }
    assert weights.keys() == set(STEP_WEIGHTS)
    inner = ((eps_policy - eps_reference) * (z_win - z_lose)).flatten(1).mean(1)
    for name, weight in weights.items():
        win, lose = ratios_of(
            lambda x, sigma, image, step: x - column * eps_policy,
            lambda x, sigma, image, step: x - column * eps_reference,
            pairs,
            Refinements(step_weight=name),
        )
        torch.testing.assert_close(win - lose, -weight * inner, rtol=1e-6, atol=1e-9)
    by_timestep = dict(zip(ddim_timesteps(20), weights["paper"].tolist(), strict=True))
    assert by_timestep.pop(51) == pytest.approx(5.431, abs=1e-3)
    assert min(by_timestep.values()) == pytest.approx(0.623, abs=1e-3)
    assert max(by_timestep.values()) == pytest.approx(1.141, abs=1e-3)
    with pytest.raises(SpoError, match="accepted are paper, gradspo, equal"):
        step_factor("other", sigma, step)


def test_dpo_equals_a_transcription_of_the_published_code():
    """Errors of the noise prediction, means over a latent, beta / 2 between them; values and gradients in float64."""
    torch.manual_seed(1)
    clean_win, clean_lose, noise, reference_win, reference_lose = torch.randn(5, 3, 4, 8, 8, dtype=torch.float64)
    output = torch.randn(6, 4, 8, 8, dtype=torch.float64, requires_grad=True)  # eps_theta, win sides first
    sigma, beta = torch.tensor([0.1, 1.5, 9.0], dtype=torch.float64), 40.0
    column = sigma[:, None, None, None]
    pairs = Pairs(
        clean_win + column * noise, clean_lose + column * noise, clean_win, clean_lose,
        torch.zeros(3, dtype=torch.bool), sigma, torch.zeros(3, dtype=torch.float64), torch.arange(3), torch.arange(3),
        torch.ones(3),
    )  # fmt: skip

    def network(eps):
        return lambda x, sigma, image, step: x - sigma[:, None, None, None] * eps

    reference = torch.cat([reference_win, reference_lose])
    result = pair_loss(network(output), network(reference), pairs, partial(dpo_loss, beta=beta))
    result.loss.mean().backward()
    gradient, output.grad = output.grad, None

    win, lose = (output - torch.cat([noise] * 2)).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    ref_win, ref_lose = (reference - torch.cat([noise] * 2)).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    expected = -torch.nn.functional.logsigmoid(-0.5 * beta * ((win - lose) - (ref_win - ref_lose)))
    expected.mean().backward()
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, output.grad, rtol=1e-6, atol=1e-10)
    assert not bool(result.clamped.any())
    assert torch.equal(transition_noise(sigma, pairs.sigma_next, 1.0).up, sigma)


@pytest.mark.parametrize("mu", [0.6, 0.9])
def test_the_winner_keeps_its_share_of_the_gain(mu):
    """Moving the output along the scaled gradient lowers the winner's error by mu of what it would alone, or more."""
    torch.manual_seed(2)
    error_win = torch.randn(50, 4, 8, 8, dtype=torch.float64)
    error_lose = (
        torch.randn(50, 4, 8, 8, dtype=torch.float64) + error_win * torch.linspace(-2, 2, 50)[:, None, None, None]
    )
    share = losing_share(error_win, error_lose, mu).double()[:, None, None, None]
    alone, along = error_win.square().sum((1, 2, 3)), (error_win * error_lose).sum((1, 2, 3))
    change = -alone + share.flatten() * along  # of half the squared error of the winner, to first order
    assert bool((change <= -mu * alone + 1e-4 * alone).all())
    assert bool((share.flatten()[along <= 0] == 1).all())
    assert 0 < int((share < 1).sum()) < 50
    expected = ((1 - mu) * alone / along).clamp(0, 1)[along > 0]
    torch.testing.assert_close(share.flatten()[along > 0], expected, rtol=1e-5, atol=1e-6)


def test_sparing_the_winner_changes_the_gradient_of_the_losing_side_only():
    torch.manual_seed(3)
    x, noise, output, base = torch.randn(4, 3, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    column = sigma[:, None, None, None]
    pairs = Pairs(
        x + column * noise, x + 0.1 + column * noise, x, x + 0.1, torch.zeros(3, dtype=torch.bool), sigma,
        torch.zeros(3, dtype=torch.float64), torch.arange(3), torch.arange(3), torch.ones(3),
    )  # fmt: skip

    def gradient(refinements):
        learnt = torch.cat([output, output + 0.01]).requires_grad_()
        result = pair_loss(
            lambda x, sigma, image, step: x - sigma[:, None, None, None] * learnt,
            lambda x, sigma, image, step: x - sigma[:, None, None, None] * torch.cat([base] * 2),
            pairs, partial(dpo_loss, beta=5.0), refinements=refinements,
        )  # fmt: skip
        result.loss.sum().backward()
        return result.loss.detach(), learnt.grad[:3], learnt.grad[3:]

    loss, win, lose = gradient(Refinements())
    same_loss, same_win, scaled = gradient(Refinements(winner_preserving=0.9))
    torch.testing.assert_close(same_loss, loss, rtol=1e-7, atol=0)
    torch.testing.assert_close(same_win, win, rtol=1e-6, atol=0)
    errors = [clean - (x - column * output) for clean, x, output in (
        (x, pairs.x_win, output), (x + 0.1, pairs.x_lose, output + 0.01)
    )]  # fmt: skip
    share = losing_share(*errors, 0.9).double()[:, None, None, None]
    assert float(share.max()) < 0.5
    torch.testing.assert_close(scaled, share * lose, rtol=1e-5, atol=1e-12)


# ---- a shift that is learnt


def test_the_loss_of_a_shift_has_its_closed_form():
    """0 where the policy is the reference moved by it; the shift's mean square by lengths squared where it is not."""
    draw = torch.Generator().manual_seed(0)
    x, win, lose, prediction, shift = torch.randn(5, 3, 4, 8, 8, generator=draw, dtype=torch.float64)
    pairs = shared_pairs(x, win, lose, torch.tensor([9.0, 2.0, 0.5]), torch.tensor([5.0, 1.0, 0.2]))
    length = torch.tensor([0.2, 0.1, 0.05], dtype=torch.float64)
    share = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)

    def reference(x, sigma, image, step):
        return prediction

    def policy(x, sigma, image, step):
        return prediction + share * shift

    made = shift_loss(policy, reference, pairs, shift, length)
    expected = shift.square().flatten(1).mean(1) / length**2
    torch.testing.assert_close(made.loss, 0.75**2 * expected)
    torch.testing.assert_close(torch.autograd.grad(made.loss.sum(), share)[0], -1.5 * expected.sum())
    moved = shift_loss(lambda *_: prediction + shift, reference, pairs, shift, length)
    torch.testing.assert_close(moved.loss, torch.zeros(3, dtype=torch.float64))
    assert not bool(moved.clamped.any())


def test_the_ratios_of_a_shift_are_those_of_the_pairs_transitions():
    draw = torch.Generator().manual_seed(1)
    x, win, lose, by_policy, by_reference = torch.randn(5, 3, 4, 8, 8, generator=draw)
    pairs = shared_pairs(x, win, lose, torch.tensor([9.0, 2.0, 0.5]), torch.tensor([5.0, 1.0, 0.2]))
    networks = (lambda *_: by_policy), (lambda *_: by_reference)
    made = shift_loss(*networks, pairs, torch.zeros_like(x), torch.ones(3))
    expected = pair_loss(*networks, pairs, lambda win, lose: spo_loss(win, lose, 10.0, 0.1))
    torch.testing.assert_close(made.ratio_win, expected.ratio_win)
    torch.testing.assert_close(made.ratio_lose, expected.ratio_lose)
