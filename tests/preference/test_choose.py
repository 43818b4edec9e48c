"""Choosing: the best candidate goes on, at the cost that its kind of model has."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.diffusion import scaled_linear_alphas_cumprod, sigma_ladder
from spo.algorithm.rollout import RolloutSettings, sample_spo
from spo.errors import SpoError
from spo.preference.choose import sample_best
from spo.rng import SeededDraws

ALPHAS = scaled_linear_alphas_cumprod()
SIGMAS = sigma_ladder("karras", 5, ALPHAS)
SEEDS = [3, 4]


class World:
    """The exact denoiser of a standard normal world; counts the latents it evaluates."""

    def __init__(self):
        self.evaluated = 0

    def __call__(self, x, sigma):
        self.evaluated += len(x)
        return x / (1 + sigma**2)[:, None, None, None]


class Mean:
    """Likes a high mean of the noisy latent, or of its prediction."""

    name, needs_pixels = "mean", False

    def __init__(self, needs_denoised):
        self.needs_denoised = needs_denoised

    def score(self, candidates, prompts):
        return (candidates.prediction() if self.needs_denoised else candidates.x).flatten(2).mean(2)


def start():
    return SeededDraws(SEEDS).initial((4, 8, 8)) * SIGMAS[0]


def best(candidates, needs_denoised=False, world=None, eta=1.0, callback=None):
    return sample_best(
        world or World(), start(), SIGMAS, callback=callback, preference=Mean(needs_denoised), prompts=["a", "b"],
        candidates=candidates, draws=SeededDraws(SEEDS), alphas_cumprod=ALPHAS, eta=eta,
    )  # fmt: skip


def plain():
    settings = RolloutSettings(candidates=1)
    return sample_spo(World(), start(), SIGMAS, settings=settings, draws=SeededDraws(SEEDS), alphas_cumprod=ALPHAS).x


@pytest.mark.parametrize("needs_denoised", [False, True])
def test_the_more_candidates_the_more_is_liked(needs_denoised):
    means = [plain().flatten(1).mean(1), *(best(count, needs_denoised).flatten(1).mean(1) for count in (2, 8))]
    assert bool((means[0] < means[1]).all() and (means[1] < means[2]).all())


def test_who_goes_on_is_the_best_of_the_step():
    """One step of two images by hand: of four draws each, the one with the highest mean."""
    sigmas = torch.tensor([2.0, 1.0])
    x = SeededDraws(SEEDS).initial((4, 8, 8)) * 2
    made = sample_best(
        World(), x, sigmas, preference=Mean(False), prompts=["a", "b"], candidates=4, draws=SeededDraws(SEEDS),
        alphas_cumprod=ALPHAS,
    )  # fmt: skip
    noise = SeededDraws(SEEDS).noise(0, 4, x)
    up = (1 * (4 - 1) / 4) ** 0.5
    denoised = x / 5
    drawn = denoised + (x - denoised) * (1 - up**2) ** 0.5 / 2 + up * noise
    chosen = torch.stack([drawn[drawn[:, n].flatten(1).mean(1).argmax(), n] for n in range(2)])
    torch.testing.assert_close(made, chosen / 2**0.5)


@pytest.mark.parametrize(("needs_denoised", "evaluations"), [(False, 2 * 5), (True, 2 + 4 * 4 * 2)])
def test_what_it_costs_and_what_is_called_back(needs_denoised, evaluations):
    world, steps = World(), []
    best(4, needs_denoised, world, callback=lambda state: steps.append(state["i"]))
    assert world.evaluated == evaluations and steps == [0, 1, 2, 3, 4]


def test_the_same_each_time_and_whatever_the_batch():
    assert torch.equal(best(3), best(3))
    alone = sample_best(
        World(), start()[1:], SIGMAS, preference=Mean(False), prompts=["b"], candidates=3,
        draws=SeededDraws(SEEDS[1:]), alphas_cumprod=ALPHAS,
    )  # fmt: skip
    torch.testing.assert_close(alone, best(3)[1:])


def test_refusals():
    with pytest.raises(SpoError, match="candidates is 1; accepted are 2 to 16"):
        best(1)
    with pytest.raises(SpoError, match="eta is 0: steps without noise"):
        best(2, eta=0.0)
