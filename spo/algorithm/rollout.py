"""The step-wise resampler: draw a pool, denoise, score, select a pair, go on from a random candidate. Paper, section 3.

`sample_spo` is a sampler over (x, sigma, denoised) of the kind that k-diffusion and the WebUI drive. It calls the
denoiser once a step: the evaluation of a pool at the next noise level serves the scoring of the pool *and* the next
step of the candidate that goes on. A preference model that reads the noisy latents (`needs_denoised` off) scores them
before that, and only the candidate that goes on is evaluated.

The last pool is scored as it is, as published: its latents are finished, so they stand for their own prediction.

Deliberate differences from the published code: pools may be restricted to a range of timesteps; a last window that
does not fit its inner steps is scored where it ends; a transition that adds no noise (the last one of a ladder that
ends at 0) draws no pool, because its candidates would all be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    timestep_min, timestep_max  pools are drawn only on transitions out of a timestep within, both ends included, and
                       no inner step goes below timestep_min
    threshold          keep a pair when its softmax gap is above
    threshold_noisiest  see `pool_threshold`; 0: one threshold for all steps
    eta                noise of a step, 1 in the paper; above 0
    candidates_per_call  at most this many candidates of each image in one network call; 0: all
    """

    candidates: int = 4
    inner_steps: int = 0
    divert_start_step: int = 4
    timestep_min: int = 0
    timestep_max: int = 1000
    threshold: float = 0.3
    threshold_noisiest: float = 0.0
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
class Scoring:
    """How pools are judged.

    preference, prompts  the model and the B prompts that it judges by
    decode  [N, C, H, W] latents -> [N, 3, 8 H, 8 W] pictures in [-1, 1]; needed by a model that looks at pictures
    watch   called with every verdict
    text    [B, D] see `Candidates`
    """

    preference: PreferenceModel
    prompts: Sequence[str]
    decode: Callable[[Tensor], Tensor] | None = None
    watch: Callable[[PoolVerdict], None] | None = None
    text: Tensor | None = None


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
    """scores [K, B] float32 of the pool drawn at `step`, scored at `timestep`; kept [B] bool. On the CPU."""

    step: int
    timestep: float
    scores: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Rollout:
    """x [B, C, H, W] the final latents, ready to decode; sigma: the noise level that the ladder left them at; pairs,
    None when none was kept; scores of every pool."""

    x: Tensor
    sigma: float
    pairs: Pairs | None
    pools: tuple[PoolScores, ...]


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of parts of a batch, of the same ladder and settings, as the one of the whole batch, image after image.

    Pairs come in the order that the whole batch has them in: by step, then by image.
    """
    if len(parts) == 1:
        return parts[0]
    counts = [len(part.x) for part in parts]
    offsets = [sum(counts[:number]) for number in range(len(parts))]
    moved = [
        replace(part.pairs, image=part.pairs.image + offset)
        for part, offset in zip(parts, offsets, strict=True)
        if part.pairs is not None
    ]
    pairs = None
    if moved:
        pairs = Pairs.cat(moved)
        pairs = pairs.rows((pairs.step * sum(counts) + pairs.image).argsort())
    pools = tuple(
        replace(same[0], scores=torch.cat([pool.scores for pool in same], 1), kept=torch.cat([p.kept for p in same]))
        for same in zip(*(part.pools for part in parts), strict=True)
    )
    return Rollout(torch.cat([part.x for part in parts]), parts[0].sigma, pairs, pools)


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
            while end > step and float(timesteps[end]) < settings.timestep_min:
                end -= 1
            windows.append((step, end))
            step = end + 1
        else:
            step += 1
    return windows


def pool_threshold(settings: RolloutSettings, noise: Tensor, step: int) -> float:
    """The threshold of a pool drawn at `step`: linear in the noise of its step, as in LPO (arXiv 2502.01051).

        threshold + (threshold_noisiest - threshold) (s - min s) / (max s - min s)

    noise [T]: s of each step in the variance-preserving form, up / sqrt(1 + sigma_next^2). The extremes are those of
    steps that add noise.
    """
    if not settings.threshold_noisiest:
        return settings.threshold
    noisy = noise[noise > 0]
    low, high = float(noisy.min()), float(noisy.max())
    share = (float(noise[step]) - low) / (high - low) if high > low else 1.0
    return settings.threshold + (settings.threshold_noisiest - settings.threshold) * share


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
    scoring: Scoring | None = None,
    repeat: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None,
) -> Rollout:
    """Sample B images step by step and collect the win-lose pairs of every pool on the way.

    model       denoiser, `model(x [N, C, H, W], sigma [N], **extra_args) -> denoised`
    x           [B, C, H, W] VE latent at noise level sigmas[0]
    sigmas      [T + 1] falling noise levels; ending at 0 or, as the paper's ladder, at the level of timestep 0
    extra_args  the model's other arguments for B latents; `repeat(extra_args, k)` makes them for k * B, candidate-major
    callback    k-diffusion's, once a step with {"x", "i", "sigma", "sigma_hat", "denoised"} of the B latents
    disable     k-diffusion's switch of its progress bar; not used
    alphas_cumprod  [1000] the network's training schedule, to name timesteps
    scoring     how pools are judged; None only with settings.candidates = 1

    The final latent is handed back as the VAE expects it, in the variance-preserving form (the same when the ladder
    ends at 0). Raises SpoError when a network's output or a score is not finite.
    """
    windows = dict(pool_starts(sigmas, alphas_cumprod, settings))
    if windows and scoring is None:
        raise SpoError("A pool of candidates needs a preference model; none was given.")
    ladder = sigmas.cpu().double()
    walk = _Walk(
        model, dict(extra_args or {}), repeat, callback, draws, settings, sigmas, ladder,
        timestep_of_sigma(ladder, alphas_cumprod.cpu()).tolist(),
        ancestral_step(ladder[:-1], ladder[1:], settings.eta),
    )  # fmt: skip
    pairs: list[Pairs] = []
    pools: list[PoolScores] = []
    latents = x[None]  # [K, B, ...], K = 1 outside a window
    denoised = walk.denoise(latents, 0)
    step = 0
    while step < walk.steps:
        if step in windows:
            assert scoring is not None
            window = _window(walk, latents, denoised, step, windows[step], scoring)
            latents, denoised = window.latents, window.denoised
            pairs.extend(window.pairs)
            pools.append(window.scores)
            step = windows[step] + 1
        else:
            latents = walk.advance(latents, denoised, step)
            step += 1
            denoised = walk.denoise(latents, step) if step < walk.steps else walk.finished(latents)
    whole = Pairs.cat(pairs) if pairs else None
    return Rollout(denoised[0], float(ladder[-1]), whole if whole is not None and len(whole) else None, tuple(pools))


@dataclass(frozen=True)
class _Walk:
    """One walk down the ladder: what every step of it needs.

    sigmas [T + 1] as given; ladder: the same in float64 on the CPU; timesteps: of each level; step_noise: of each step
    """

    model: Callable[..., Tensor]
    extra: Mapping[str, Any]
    repeat: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None
    callback: Callable[[dict[str, Any]], None] | None
    draws: Draws
    settings: RolloutSettings
    sigmas: Tensor
    ladder: Tensor
    timesteps: list[float]
    step_noise: AncestralStep

    @property
    def steps(self) -> int:
        """T; levels are numbered 0 ... T, and step n leads from level n to level n + 1."""
        return len(self.sigmas) - 1

    def denoise(self, latents: Tensor, level: int) -> Tensor:
        """[K, B, ...] latents at a level -> denoised [K, B, ...], `candidates_per_call` candidates in one call."""
        parts = []
        for chunk in latents.split(self.settings.candidates_per_call or len(latents)):
            count = len(chunk)
            if count > 1 and self.repeat is None and self.extra:
                raise SpoError("A pool of candidates needs `repeat` to repeat the denoiser's arguments; none given.")
            extra = self.repeat(self.extra, count) if count > 1 and self.repeat is not None else self.extra
            flat = chunk.flatten(0, 1)
            sigma = self.sigmas[level] * flat.new_ones(len(flat))
            parts.append(self.model(flat, sigma, **extra).unflatten(0, chunk.shape[:2]))
        denoised = torch.cat(parts)
        if not bool(torch.isfinite(denoised).all()):
            raise SpoError(
                f"The network's output is not finite at step {level} (timestep {self.timesteps[level]:.0f}): "
                "use float32 or bfloat16, a VAE or checkpoint without overflow, or a lower learning rate."
            )
        return denoised

    def advance(self, latents: Tensor, denoised: Tensor, step: int) -> Tensor:
        """One ancestral step of [K, B, ...] latents. Candidates of a fresh pool share their parent, not their noise."""
        if self.callback is not None:
            sigma, one = self.sigmas[step], {"x": latents[0], "i": step, "denoised": denoised[0]}
            self.callback({**one, "sigma": sigma, "sigma_hat": sigma})
        mean = transition_mean(latents, denoised, self.ladder[step], self.step_noise.down[step]).to(latents.dtype)
        up = float(self.step_noise.up[step])
        return mean + up * self.draws.noise(step, len(latents), latents[0]) if up > 0 else mean

    def finished(self, latents: Tensor) -> Tensor:
        """[K, B, ...] latents at the last level, as the VAE expects them: in the variance-preserving form."""
        flat = latents.flatten(0, 1)
        final = network_input(flat, self.ladder[-1].expand(len(flat)).to(flat.device))
        return final.to(latents.dtype).unflatten(0, latents.shape[:2])


@dataclass(frozen=True)
class _Transition:
    """x -> x_next [K, B, C, H, W] of one step inside a window."""

    step: int
    x: Tensor
    x_next: Tensor


@dataclass(frozen=True)
class _Window:
    """What a window leaves: latents, denoised [1, B, ...] of the candidate that goes on; its pairs and scores."""

    latents: Tensor
    denoised: Tensor
    pairs: list[Pairs]
    scores: PoolScores


def _window(walk: _Walk, latents: Tensor, denoised: Tensor, first: int, last: int, scoring: Scoring) -> _Window:
    """Draw a pool from [1, B, ...] at step `first`, walk it to the end of step `last`, judge it, choose who goes on."""
    settings, preference = walk.settings, scoring.preference
    latents, denoised = (value.expand(settings.candidates, *value.shape[1:]) for value in (latents, denoised))
    path = []
    for step in range(first, last + 1):
        following = walk.advance(latents, denoised, step)
        path.append(_Transition(step, latents, following))
        latents = following
        if step < last:
            denoised = walk.denoise(latents, step + 1)

    # the verdict, at the level where the window ends
    level = last + 1
    predicted: Tensor | None = None
    if level == walk.steps:
        predicted = walk.finished(latents)
    elif preference.needs_denoised:
        predicted = walk.denoise(latents, level)
    pool = Candidates(
        latents, float(walk.ladder[level]), walk.timesteps[level], predicted, _decoder(scoring.decode), scoring.text
    )
    scores = preference.score(pool, scoring.prompts).float()
    if not bool(torch.isfinite(scores).all()):
        raise SpoError(f'The preference model "{preference.name}" gave a score that is not finite at step {last}.')
    noise = walk.step_noise.up * (1 + walk.ladder[1:] ** 2).rsqrt()
    selection = select_pairs(scores, pool_threshold(settings, noise, first))
    noisy = [transition for transition in path if walk.step_noise.up[transition.step] > 0]  # the others have no density
    pairs = [_pairs_of(transition, selection, walk.sigmas) for transition in noisy]

    # the next parent: at random, never the best (paper, ablation)
    parents = walk.draws.parents(last, settings.candidates).to(latents.device)
    if scoring.watch is not None:
        scoring.watch(PoolVerdict(first, pool.timestep, pool, scores, selection, parents))
    latents = _take(latents, parents)[None]
    denoised = walk.denoise(latents, level) if predicted is None else _take(predicted, parents)[None]
    return _Window(latents, denoised, pairs, PoolScores(first, pool.timestep, scores.cpu(), selection.kept.cpu()))


def _decoder(decode: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    if decode is not None:
        return decode

    def refuse(latents: Tensor) -> Tensor:
        raise SpoError("This preference model looks at pictures, and the rollout was given no decoder.")

    return refuse


def _take(values: Tensor, index: Tensor) -> Tensor:
    """[K, B, ...] and [B] -> [B, ...], the candidate that `index` names for each image."""
    return values[index, torch.arange(values.shape[1], device=values.device)]


def _pairs_of(transition: _Transition, selection: Selection, sigmas: Tensor) -> Pairs:
    """The kept pairs of one transition of a window, ordered by image. The pool's own draw starts from a shared x."""
    image = selection.kept.nonzero()[:, 0]
    x_win, x_lose = (_take(transition.x, index)[image] for index in (selection.win, selection.lose))
    next_win, next_lose = (_take(transition.x_next, index)[image] for index in (selection.win, selection.lose))
    shared = (x_win == x_lose).flatten(1).all(1)
    step = transition.step
    return Pairs(
        x_win, x_lose, next_win, next_lose, shared,
        sigma=sigmas[step].float().to(image.device).expand(len(image)),
        sigma_next=sigmas[step + 1].float().to(image.device).expand(len(image)),
        image=image,
        step=torch.full_like(image, step),
        gap=selection.gap[image],
    )  # fmt: skip
