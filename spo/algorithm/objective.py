"""The losses of win-lose pairs: SPO's (paper, eq. 8; DPO on single denoising transitions) and Diffusion-DPO's; and,
without a verdict, that of a prediction that is to move (`shift_loss`).

A transition x -> x' is Gaussian, p(x' | x) = N(mu, up^2), with mu on the way from x to the denoised latent (see
`diffusion.transition_mean`), so the log ratio of policy and reference has a closed form. Over the D elements of a
latent

    log r = log p_policy(x' | x) - log p_reference(x' | x) = (|x' - mu_ref|^2 - |x' - mu|^2) / (2 up^2 D)

averaged, not summed, as the published code does and as beta = 10 and the clamp were set for. It is evaluated as the
difference of the two densities on its left side; in that order of rounding recorded runs come out bit for bit.

Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14) has the same form. Its pairs lead from a noised picture x
straight to the clean one, x' = x_0 and sigma_next = 0, which has mu = denoised; with the noise level as deviation,
up = sigma, and x_0 - denoised = sigma (eps_theta - eps), log r = (|eps - eps_ref|^2 - |eps - eps_theta|^2) / (2 D).

Deliberate differences from the published code, values unchanged:
- the clamp acts on log ratios, whose gradient stays finite at extreme ratios (exp -> clamp -> log gives NaN there);
- a pair whose win and lose side start from the same x is evaluated once for both sides, by policy and reference each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.algorithm.diffusion import (
    AncestralStep,
    ancestral_step,
    per_image,
    precise,
    transition_log_density,
    transition_mean,
)
from spo.algorithm.pairs import Pairs
from spo.errors import SpoError

# (x [N, C, H, W] VE, sigma [N], image [N], step [N]) -> denoised [N, C, H, W]; image and step as in `Pairs`
PairDenoiser = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# (log r_w [P], log r_l [P]) -> the loss of each pair
RatioLoss = Callable[[Tensor, Tensor], "PairLoss"]


@dataclass(frozen=True)
class PairLoss:
    """loss [P] for each pair; ratio_win, ratio_lose [P] p_policy / p_reference before the clamp, detached;
    clamped [P] bool, win or lose ratio outside the clamp (no gradient from that side)."""

    loss: Tensor
    ratio_win: Tensor
    ratio_lose: Tensor
    clamped: Tensor


def spo_loss(log_ratio_win: Tensor, log_ratio_lose: Tensor, beta: float, ratio_clamp: float) -> PairLoss:
    """-log sigmoid(beta * log r_w - beta * log r_l) with both ratios r clamped to 1 +- ratio_clamp.

    log_ratio_*  [P] log p_policy(x_next | x) - log p_reference(x_next | x), each the mean over a latent's elements
    beta         strength, 10 in the paper; ratio_clamp  0.1 in the paper, 0 < ratio_clamp < 1
    """
    low, high = math.log(1 - ratio_clamp), math.log(1 + ratio_clamp)
    win = log_ratio_win.clamp(low, high)
    lose = log_ratio_lose.clamp(low, high)
    outside = (win != log_ratio_win) | (lose != log_ratio_lose)
    with torch.no_grad():
        ratio_win, ratio_lose = log_ratio_win.exp(), log_ratio_lose.exp()
    return PairLoss(-logsigmoid(beta * (win - lose)), ratio_win, ratio_lose, outside.detach())


def dpo_loss(log_ratio_win: Tensor, log_ratio_lose: Tensor, beta: float) -> PairLoss:
    """-log sigmoid(beta * log r_w - beta * log r_l), nothing clamped. Diffusion-DPO, eq. 14, with beta for its beta T.

    log_ratio_*  as in `spo_loss`, of pairs that lead to the clean picture; beta  2000 for SD1.5, 5000 for SDXL there
    """
    with torch.no_grad():
        ratio_win, ratio_lose = log_ratio_win.exp(), log_ratio_lose.exp()
    loss = -logsigmoid(beta * (log_ratio_win - log_ratio_lose))
    return PairLoss(loss, ratio_win, ratio_lose, torch.zeros_like(loss, dtype=torch.bool))


STEP_WEIGHTS = ("paper", "gradspo", "equal")


@dataclass(frozen=True)
class Refinements:
    """What later papers change about the gradient of a pair. The defaults change nothing.

    step_weight        see `step_factor`
    winner_preserving  see `losing_share`; 0: off
    """

    step_weight: str = "paper"
    winner_preserving: float = 0.0


def step_factor(step_weight: str, sigma: Tensor, noise: AncestralStep) -> Tensor:
    """[P] float64 what the log ratios of a step are multiplied by, before the clamp.

    The log ratios of a pair whose sides start from one latent, x' = mu + up z, differ by

        log r_w - log r_l = -w_t <eps_policy - eps_reference, z_w - z_l> / D,    w_t = (sigma - down) / up;

    on the paper's ladder w_t is 0.62 to 1.14, but 5.43 at timestep 51. The factor replaces w_t:

    paper    by itself
    gradspo  by sqrt(1 - alpha_bar_t) = sigma / sqrt(1 + sigma^2) (GradSPO, NeurIPS 2025)
    equal    by 1

    sigma [P] and noise of the pairs. Raises SpoError for another name.
    """
    level = precise(sigma)
    own = (level - noise.down) / noise.up
    if step_weight == "paper":
        return torch.ones_like(own)
    if step_weight == "gradspo":
        return level * (1 + level**2).rsqrt() / own
    if step_weight == "equal":
        return 1 / own
    raise SpoError(f'step_weight is "{step_weight}"; accepted are {", ".join(STEP_WEIGHTS)}.')


def losing_share(error_win: Tensor, error_lose: Tensor, winner_preserving: float) -> Tensor:
    """[P] 0 ... 1, by how much the gradient of the losing side is scaled so that it spares the winner.

        lambda = clamp((1 - mu) |g_w|^2 / <g_l, g_w>, 0, 1), and 1 where <g_l, g_w> <= 0

    with the gradients g of the sides' squared errors by the network's output: to first order an update then lowers the
    winner's error by at least mu times what it would alone. Diffusion-SDPO (arXiv 2511.03317), for each pair by itself
    where the published code takes a batch's pairs together.

    error_win, error_lose  [P, C, H, W] x' - mu of each side, to which g is proportional; winner_preserving  mu, 0 ... 1
    """
    along = (error_lose.float() * error_win.float()).flatten(1).sum(1)
    own = error_win.float().square().flatten(1).sum(1)
    cap = (1 - winner_preserving) * own / along.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(along > 0, cap.clamp(0, 1), torch.ones_like(cap))


def transition_noise(sigma: Tensor, sigma_next: Tensor, eta: float) -> AncestralStep:
    """The step that pairs were sampled with; straight to a clean picture (sigma_next 0), with sigma as deviation."""
    step = ancestral_step(sigma, sigma_next, eta)
    to_clean = precise(sigma_next).to(step.up.device) == 0
    return AncestralStep(step.down, torch.where(to_clean, precise(sigma).to(step.up.device), step.up))


def pair_loss(
    policy: PairDenoiser,
    reference: PairDenoiser,
    pairs: Pairs,
    loss: RatioLoss,
    eta: float = 1.0,
    refinements: Refinements = Refinements(),
) -> PairLoss:
    """The loss of P pairs, with gradient to what `policy` computes with.

    policy, reference  the network with its adapter, and without (or as training began); reference: no gradient
    loss               of the log ratios, `spo_loss` with its beta and clamp
    eta                noise of the steps that the pairs come from
    """
    # one evaluation for a pair with a shared x, two for the others (inner steps): their lose sides follow the win sides
    own = (~pairs.shared).nonzero()[:, 0]
    lose_rows = torch.arange(len(pairs), device=own.device)
    lose_rows[own] = len(pairs) + torch.arange(len(own), device=own.device)
    x = torch.cat([pairs.x_win, pairs.x_lose[own]])
    sigma, sigma_next, image, step = (
        torch.cat([value, value[own]]) for value in (pairs.sigma, pairs.sigma_next, pairs.image, pairs.step)
    )
    noise = transition_noise(sigma, sigma_next, eta)
    up = noise.up[: len(pairs)]

    def means(denoised: Tensor) -> tuple[Tensor, Tensor]:
        mean = transition_mean(x, denoised, sigma, noise.down)
        return mean[: len(pairs)], mean[lose_rows]

    def log_densities(mean_win: Tensor, mean_lose: Tensor) -> tuple[Tensor, Tensor]:
        return (
            transition_log_density(pairs.next_win, mean_win, up),
            transition_log_density(pairs.next_lose, mean_lose, up),
        )

    with torch.no_grad():
        reference_win, reference_lose = log_densities(*means(reference(x, sigma, image, step)))
    mean_win, mean_lose = means(policy(x, sigma, image, step))
    policy_win, policy_lose = log_densities(mean_win, mean_lose)
    return loss(
        *_refined(
            policy_win - reference_win, policy_lose - reference_lose, pairs, mean_win, mean_lose, eta, refinements
        )
    )


def shift_loss(
    policy: PairDenoiser, reference: PairDenoiser, pairs: Pairs, shift: Tensor, length: Tensor, eta: float = 1.0
) -> PairLoss:
    """How far the policy's prediction is from the reference's, moved: |denoised - denoised_ref - shift|^2 / (D l^2).

    No verdict is in it. The ratios say all the same whether the policy has come to favour the winners: they are those
    of the pairs' transitions. Nothing is clamped.

    pairs   whose sides start from one latent, x_win; shift  [P, C, H, W] what the prediction is to move by there
    length  [P] root mean square of a full shift, by which all noise levels weigh alike; others as in `pair_loss`
    """
    sigma, noise = pairs.sigma, transition_noise(pairs.sigma, pairs.sigma_next, eta)
    with torch.no_grad():
        target = reference(pairs.x_win, sigma, pairs.image, pairs.step)
    denoised = policy(pairs.x_win, sigma, pairs.image, pairs.step)
    loss = ((denoised - target - shift) / per_image(length, shift)).square().flatten(1).mean(1)

    def log_density(x_next: Tensor, prediction: Tensor) -> Tensor:
        return transition_log_density(x_next, transition_mean(pairs.x_win, prediction, sigma, noise.down), noise.up)

    with torch.no_grad():
        ratio_win, ratio_lose = (
            (log_density(x_next, denoised) - log_density(x_next, target)).exp()
            for x_next in (pairs.next_win, pairs.next_lose)
        )
    return PairLoss(loss, ratio_win, ratio_lose, torch.zeros_like(loss, dtype=torch.bool))


def _refined(
    log_ratio_win: Tensor,
    log_ratio_lose: Tensor,
    pairs: Pairs,
    mean_win: Tensor,
    mean_lose: Tensor,
    eta: float,
    refinements: Refinements,
) -> tuple[Tensor, Tensor]:
    """The log ratios [P] of both sides as refined; mean_*: the policy's, [P, C, H, W]."""
    if refinements.step_weight != "paper":
        noise = transition_noise(pairs.sigma, pairs.sigma_next, eta)
        factor = step_factor(refinements.step_weight, pairs.sigma, noise).to(log_ratio_win)
        log_ratio_win, log_ratio_lose = factor * log_ratio_win, factor * log_ratio_lose
    if refinements.winner_preserving:
        with torch.no_grad():
            errors = pairs.next_win - mean_win, pairs.next_lose - mean_lose
            share = losing_share(*errors, refinements.winner_preserving)
            constant = (1 - share) * log_ratio_lose
        log_ratio_lose = share * log_ratio_lose + constant  # the same value, a part of its gradient
    return log_ratio_win, log_ratio_lose


def backward_by_sides(
    policy: PairDenoiser,
    reference: PairDenoiser,
    pairs: Pairs,
    loss: RatioLoss,
    backward: Callable[[Tensor], None],
    eta: float = 1.0,
    refinements: Refinements = Refinements(),
) -> PairLoss:
    """The gradient that `backward(pair_loss(...).loss)` gives, with the graph of one side in memory at a time.

    The loss depends on a side's network only through its log ratio, so the chain rule splits it: the log ratios first,
    without a graph; the loss's derivatives by them, a number for each pair and side; then each side again with a graph,
    its log ratios weighed by those numbers. For pairs whose sides start from latents of their own (inner steps) that
    halves the memory, for one more evaluation of each side.

    backward  goes backward from the loss of each pair [P]: its sum or mean, scaled as one likes
    """
    win = _Side(pairs.x_win, pairs.next_win, pairs.sigma, pairs.sigma_next, pairs.image, pairs.step)
    lose = replace(win, x=pairs.x_lose, x_next=pairs.next_lose)
    with torch.no_grad():
        references = [side.log_density(side.mean(reference, eta), eta) for side in (win, lose)]
        means = [side.mean(policy, eta) for side in (win, lose)]
        ratios = [
            side.log_density(mean, eta) - by_reference
            for side, mean, by_reference in zip((win, lose), means, references, strict=True)
        ]
    ratios = [ratio.requires_grad_() for ratio in ratios]
    with torch.enable_grad():
        result = loss(*_refined(ratios[0], ratios[1], pairs, means[0], means[1], eta, refinements))
        backward(result.loss)
    for side, ratio in zip((win, lose), ratios, strict=True):
        assert ratio.grad is not None
        with torch.enable_grad():
            (side.log_density(side.mean(policy, eta), eta) * ratio.grad).sum().backward()
    return replace(result, loss=result.loss.detach())


@dataclass(frozen=True)
class _Side:
    """The win or the lose sides of P pairs: transitions x -> x_next."""

    x: Tensor
    x_next: Tensor
    sigma: Tensor
    sigma_next: Tensor
    image: Tensor
    step: Tensor

    def mean(self, denoiser: PairDenoiser, eta: float) -> Tensor:
        """[P, C, H, W] of each transition, by a network."""
        noise = transition_noise(self.sigma, self.sigma_next, eta)
        return transition_mean(self.x, denoiser(self.x, self.sigma, self.image, self.step), self.sigma, noise.down)

    def log_density(self, mean: Tensor, eta: float) -> Tensor:
        """[P] of each transition."""
        return transition_log_density(self.x_next, mean, transition_noise(self.sigma, self.sigma_next, eta).up)
