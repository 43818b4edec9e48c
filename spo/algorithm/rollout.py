"""The step-wise resampler: draw a pool, denoise, score, select a pair, go on from a random candidate. Paper, section 3.

`sample_spo` is a sampler over (x, sigma, denoised) of the kind that k-diffusion and the WebUI drive. It calls the
denoiser once a step: the evaluation of a pool at the next noise level serves the scoring of the pool *and* the next
step of the candidate that goes on. A preference model that reads the noisy latents (`needs_denoised` off) scores them
before that, and only the candidate that goes on is evaluated.

Deliberate differences from the published code: pools may be restricted to a range of timesteps; a last window that
does not fit its inner steps is scored where it ends; a transition that adds no noise (the last one of a ladder that
ends at 0) draws no pool, because its candidates would all be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spo.algorithm.diffusion import AncestralStep, ancestral_step, network_input, timestep_of_sigma, transition_mean
from spo.algorithm.pairs import Pairs, Selection, select_pairs
from spo.algorithm.preference import Candidates, PreferenceModel
from spo.errors import SpoError


@dataclass(frozen=True)
class RolloutSettings:
    """Paper, table of settings. Defaults are SD1.5's.

    candidates         K, size of a pool, 2 or more (1: plain ancestral sampling, no pairs)
    inner_steps        ordinary steps that each candidate takes between its draw and its verdict (SDXL: 3)
    divert_start_step  first step that draws a pool
    timestep_min, timestep_max  pools are drawn only on transitions out of a timestep within, both ends included
    threshold          keep a pair when its softmax gap is above
    eta                noise of a step, 1 in the paper; above 0
    candidates_per_call  at most this many candidates of each image in one network call; 0: all
    """

    candidates: int = 4
    inner_steps: int = 0
    divert_start_step: int = 4
    timestep_min: int = 0
    timestep_max: int = 1000
    threshold: float = 0.3
    eta: float = 1.0
    candidates_per_call: int = 0


class Draws(Protocol):
    """Where the rollout's randomness comes from; `rng.SeededDraws` is the usual one."""

    def noise(self, step: int, candidates: int, like: Tensor) -> Tensor:
        """[candidates, B, C, H, W] standard normal; like [B, C, H, W]."""
        ...

    def parents(self, step: int, candidates: int) -> Tensor:
        """[B] int64 in 0 ... candidates - 1."""
        ...


@dataclass(frozen=True)
class PoolVerdict:
    """One scored pool, for whoever watches the rollout.

    step        first step of the pool's window; timestep: that of the scored latents
    candidates  what was scored
    scores      [K, B]; selection: win, lose, kept; parents [B]: who goes on
    """

    step: int
    timestep: float
    candidates: Candidates
    scores: Tensor
    selection: Selection
    parents: Tensor


@dataclass(frozen=True)
class PoolScores:
    """scores [K, B] float32 of the pool drawn at `step`, scored at `timestep`; kept [B] bool."""

    step: int
    timestep: float
    scores: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Rollout:
    """x [B, C, H, W] the final latents, ready to decode; pairs, None when none was kept; scores of every pool."""

    x: Tensor
    pairs: Pairs | None
    pools: tuple[PoolScores, ...]


def pool_starts(sigmas: Tensor, alphas_cumprod: Tensor, settings: RolloutSettings) -> list[tuple[int, int]]:
    """(first step, last step) of every window, in order. A window is a pool's draw and its inner steps.

    sigmas [T + 1]. Empty with K = 1. Raises SpoError for inner steps, start step or eta that make no sense.
    """
    if settings.candidates < 1 or settings.inner_steps < 0 or settings.divert_start_step < 0:
        raise SpoError(
            f"candidates {settings.candidates}, inner_steps {settings.inner_steps} and divert_start_step "
            f"{settings.divert_start_step} must be at least 1, 0 and 0."
        )
    if settings.candidates == 1:
        return []
    timesteps = timestep_of_sigma(sigmas[:-1].cpu(), alphas_cumprod.cpu())
    noise = ancestral_step(sigmas[:-1].cpu(), sigmas[1:].cpu(), settings.eta).up
    windows: list[tuple[int, int]] = []
    step, last = settings.divert_start_step, len(sigmas) - 2
    while step <= last:
        inside = settings.timestep_min <= float(timesteps[step]) <= settings.timestep_max
        if inside and float(noise[step]) > 0:
            end = min(step + settings.inner_steps, last)
            windows.append((step, end))
            step = end + 1
        else:
            step += 1
    return windows


@torch.no_grad()
def sample_spo(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    settings: RolloutSettings,
    draws: Draws,
    alphas_cumprod: Tensor,
    preference: PreferenceModel | None = None,
    prompts: Sequence[str] = (),
    decode: Callable[[Tensor], Tensor] | None = None,
    repeat: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None,
    watch: Callable[[PoolVerdict], None] | None = None,
) -> Rollout:
    """Sample B images step by step and collect the win-lose pairs of every pool on the way.

    model       denoiser, `model(x [N, C, H, W], sigma [N], **extra_args) -> denoised`
    x           [B, C, H, W] VE latent at noise level sigmas[0]
    sigmas      [T + 1] falling noise levels; ending at 0 or, as the paper's ladder, at the level of timestep 0
    extra_args  the model's other arguments for B latents; `repeat(extra_args, k)` makes them for k * B, candidate-major
    callback    k-diffusion's, once a step with {"x", "i", "sigma", "sigma_hat", "denoised"} of the B latents
    disable     k-diffusion's switch of its progress bar; not used
    alphas_cumprod  [1000] the network's training schedule, to name timesteps
    preference, prompts  scores the pools; None only with settings.candidates = 1
    decode      latents -> pictures in [-1, 1], needed when the preference model looks at pictures
    watch       called with every verdict

    The final latent is handed back as the VAE expects it, in the variance-preserving form (the same when the ladder
    ends at 0); the last pool is scored on it as it is, at the last sigma's timestep (paper.md: "scored as it is").
    Raises SpoError when a network's output is not finite.
    """
    extra = dict(extra_args or {})
    windows = dict(pool_starts(sigmas, alphas_cumprod, settings))
    if windows and preference is None:
        raise SpoError("A pool of candidates needs a preference model; none was given.")
    ladder = sigmas.double().cpu()
    timesteps = timestep_of_sigma(ladder, alphas_cumprod.cpu()).tolist()
    steps = ancestral_step(ladder[:-1], ladder[1:], settings.eta)
    last = len(sigmas) - 2

    scores_noisy = not getattr(preference, "needs_denoised", True)

    def denoise(latents: Tensor, level: int) -> Tensor:
        denoised = _denoise(model, latents, sigmas[level], extra, repeat, settings.candidates_per_call)
        if not bool(torch.isfinite(denoised).all()):
            raise SpoError(
                f"The network's output is not finite at step {level} (timestep {timesteps[level]:.0f}): "
                "use float32 or bfloat16, a VAE or checkpoint without overflow, or a lower learning rate."
            )
        return denoised

    latents = x[None]  # [K, B, ...], K = 1 outside a window
    denoised = denoise(latents, 0)
    pairs: list[Pairs] = []
    pools: list[PoolScores] = []
    path: list[_Transition] = []
    window = (-1, -1)
    for step in range(last + 1):
        if callback is not None:
            sigma = sigmas[step]
            callback({"x": latents[0], "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised[0]})
        if step in windows:
            window, path = (step, windows[step]), []
            latents, denoised = (value.expand(settings.candidates, *value.shape[1:]) for value in (latents, denoised))
        following = _advance(latents, denoised, ladder, steps, step, draws)
        if step <= window[1]:
            path.append(_Transition(step, latents, following))
        latents = following
        waits = scores_noisy and step == window[1] and step < last
        if waits:
            denoised = latents
        elif step < last:
            denoised = denoise(latents, step + 1)
        else:
            flat = latents.flatten(0, 1)
            final = network_input(flat, ladder[-1].expand(len(flat)).to(flat.device))
            denoised = final.to(latents.dtype).unflatten(0, latents.shape[:2])
        if step != window[1]:
            continue
        assert preference is not None
        pool = Candidates(latents, float(ladder[step + 1]), timesteps[step + 1], denoised, _decoder(decode))
        scores = preference.score(pool, prompts).float()
        if not bool(torch.isfinite(scores).all()):
            raise SpoError(f'The preference model "{preference.name}" gave a score that is not finite at step {step}.')
        selection = select_pairs(scores, settings.threshold)
        pairs.extend(_pairs_of(transition, selection, sigmas) for transition in path)
        pools.append(PoolScores(window[0], pool.timestep, scores.cpu(), selection.kept.cpu()))
        parents = draws.parents(step, settings.candidates).to(latents.device)
        if watch is not None:
            watch(PoolVerdict(window[0], pool.timestep, pool, scores, selection, parents))
        latents, denoised = (_take(value, parents)[None] for value in (latents, denoised))
        if waits:
            denoised = denoise(latents, step + 1)
    kept = Pairs.cat(pairs) if pairs else None
    return Rollout(denoised[0], kept if kept is not None and len(kept) else None, tuple(pools))


@dataclass(frozen=True)
class _Transition:
    """x -> x_next [K, B, C, H, W] of one step inside a window."""

    step: int
    x: Tensor
    x_next: Tensor


def _decoder(decode: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    if decode is not None:
        return decode

    def refuse(latents: Tensor) -> Tensor:
        raise SpoError("This preference model looks at pictures, and the rollout was given no decoder.")

    return refuse


def _denoise(
    model: Callable[..., Tensor],
    latents: Tensor,
    sigma: Tensor,
    extra: Mapping[str, Any],
    repeat: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None,
    per_call: int,
) -> Tensor:
    """[K, B, ...] -> denoised [K, B, ...], at most `per_call` candidates in one call of the model."""
    parts = []
    for chunk in latents.split(per_call or len(latents)):
        count = len(chunk)
        if count > 1 and repeat is None and extra:
            raise SpoError("A pool of candidates needs `repeat` to repeat the denoiser's arguments; none was given.")
        arguments = repeat(extra, count) if count > 1 and repeat is not None else extra
        flat = chunk.flatten(0, 1)
        parts.append(model(flat, sigma * flat.new_ones(len(flat)), **arguments).unflatten(0, chunk.shape[:2]))
    return torch.cat(parts)


def _advance(
    latents: Tensor, denoised: Tensor, ladder: Tensor, steps: AncestralStep, step: int, draws: Draws
) -> Tensor:
    """One ancestral step of [K, B, ...] latents. Candidates of a fresh pool share their parent and differ in noise."""
    mean = transition_mean(latents, denoised, ladder[step], steps.down[step]).to(latents.dtype)
    up = float(steps.up[step])
    return mean + up * draws.noise(step, len(latents), latents[0]) if up > 0 else mean


def _take(values: Tensor, index: Tensor) -> Tensor:
    """[K, B, ...] and [B] -> [B, ...], the candidate that `index` names for each image."""
    return values[index, torch.arange(values.shape[1], device=values.device)]


def _pairs_of(transition: _Transition, selection: Selection, sigmas: Tensor) -> Pairs:
    """The kept pairs of one transition of a window, ordered by image. The pool's own draw starts from a shared x."""
    kept = selection.kept.nonzero()[:, 0]
    x_win, x_lose = (_take(transition.x, index)[kept] for index in (selection.win, selection.lose))
    next_win, next_lose = (_take(transition.x_next, index)[kept] for index in (selection.win, selection.lose))
    shared = (x_win == x_lose).flatten(1).all(1)
    step = transition.step
    return Pairs(
        x_win, x_lose, next_win, next_lose, shared,
        sigma=sigmas[step].float().to(kept.device).expand(len(kept)),
        sigma_next=sigmas[step + 1].float().to(kept.device).expand(len(kept)),
        image=kept,
        step=torch.full_like(kept, step),
        gap=selection.gap[kept],
    )  # fmt: skip
