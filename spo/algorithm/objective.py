"""The SPO loss of win-lose pairs. Paper, eq. 8; DPO on single denoising transitions.

A transition x -> x' is Gaussian, p(x' | x) = N(mu, up^2), with mu on the way from x to the denoised latent (see
`diffusion.transition_mean`), so the log ratio of policy and reference has a closed form. Over the D elements of a
latent

    log r = log p_policy(x' | x) - log p_reference(x' | x) = (|x' - mu_ref|^2 - |x' - mu|^2) / (2 up^2 D)

averaged, not summed, as the published code does and as beta = 10 and the clamp were set for. It is evaluated as the
difference of the two densities on its left side; in that order of rounding recorded runs come out bit for bit.

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

from spo.algorithm.diffusion import ancestral_step, transition_log_density, transition_mean
from spo.algorithm.pairs import Pairs

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


def pair_loss(
    policy: PairDenoiser, reference: PairDenoiser, pairs: Pairs, loss: RatioLoss, eta: float = 1.0
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
    noise = ancestral_step(sigma, sigma_next, eta)

    def log_densities(denoised: Tensor) -> tuple[Tensor, Tensor]:
        mean = transition_mean(x, denoised, sigma, noise.down)
        win = transition_log_density(pairs.next_win, mean[: len(pairs)], noise.up[: len(pairs)])
        return win, transition_log_density(pairs.next_lose, mean[lose_rows], noise.up[: len(pairs)])

    with torch.no_grad():
        reference_win, reference_lose = log_densities(reference(x, sigma, image, step))
    policy_win, policy_lose = log_densities(policy(x, sigma, image, step))
    return loss(policy_win - reference_win, policy_lose - reference_lose)


def backward_by_sides(
    policy: PairDenoiser,
    reference: PairDenoiser,
    pairs: Pairs,
    loss: RatioLoss,
    backward: Callable[[Tensor], None],
    eta: float = 1.0,
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
        references = [side.log_density(reference, eta) for side in (win, lose)]
        ratios = [
            side.log_density(policy, eta) - by_reference
            for side, by_reference in zip((win, lose), references, strict=True)
        ]
    ratios = [ratio.requires_grad_() for ratio in ratios]
    with torch.enable_grad():
        result = loss(*ratios)
        backward(result.loss)
    for side, ratio in zip((win, lose), ratios, strict=True):
        assert ratio.grad is not None
        with torch.enable_grad():
            (side.log_density(policy, eta) * ratio.grad).sum().backward()
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

    def log_density(self, denoiser: PairDenoiser, eta: float) -> Tensor:
        """[P] of each transition, by a network."""
        noise = ancestral_step(self.sigma, self.sigma_next, eta)
        denoised = denoiser(self.x, self.sigma, self.image, self.step)
        return transition_log_density(self.x_next, transition_mean(self.x, denoised, self.sigma, noise.down), noise.up)
