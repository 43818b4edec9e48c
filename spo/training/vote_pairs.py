"""Pools of pictures to vote on, made by the host that will train: same prompt, different noise; two are a pair.

The first picture of a pool is the ordinary picture of its seed. The others part ways with it at a step: the same seed
with other noise from there on, as SPO's own candidates differ, or other seeds altogether. Pictures that part ways are
one pool of SPO's whose inner steps last to the end, so that they cost one window of `sample_spo` and work in every host
as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spo.algorithm.preference import Candidates
from spo.algorithm.rollout import PoolVerdict, RolloutSettings
from spo.errors import SpoError
from spo.images import to_picture
from spo.preference.taste.votes import VotePair, VotePool
from spo.rng import stable_seed
from spo.training.host import Host
from spo.training.memory import Portion, halve_decode_batch, in_portions, retry_with_less

_LESS_MEMORY = "choose a smaller width and height, or close other programs"


class _NoPreference:
    """All candidates are worth the same: a pool that is only drawn, not judged."""

    name, needs_pixels, needs_denoised = "none", False, True

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(candidates.x.shape[:2], device=candidates.x.device)


def make_pairs(
    host: Host, prompts: Sequence[str], seeds: Sequence[int], from_step: int | None = 4, eta: float = 1.0
) -> list[VotePair]:
    """One pair for each prompt and seed, in one batch; see `make_pools`."""
    made = _make(host, prompts, seeds, 2, from_step, eta)
    return [
        VotePair(
            prompt, latents, pixels, left, right, _step(from_step), host.architecture, host.checkpoint_name,
            host.checkpoint_hash, _text(host, prompt),
        )
        for prompt, latents, pixels, (left, right) in made
    ]  # fmt: skip


def make_pools(
    host: Host,
    prompts: Sequence[str],
    seeds: Sequence[int],
    count: int = 4,
    from_step: int | None = 4,
    eta: float = 1.0,
) -> list[VotePool]:
    """One pool of `count` pictures for each prompt and seed, in one batch, or fewer at a time when memory runs out. The
    host must know the prompts (`prepare`).

    from_step  the pictures share their seed, and differ in the noise of this step and of all later ones; the earlier,
               the more they differ. None: different seeds, the others derived from the first
    eta        noise of a step; must be above 0 with from_step

    Raises SpoError when from_step is not a step of the host's ladder that adds noise.
    """
    made = _make(host, prompts, seeds, count, from_step, eta)
    return [
        VotePool(
            prompt, latents, tuple(to_picture(one) for one in pixels), of, _step(from_step), host.architecture,
            host.checkpoint_name, host.checkpoint_hash, _text(host, prompt),
        )
        for prompt, latents, pixels, of in made
    ]  # fmt: skip


def _make(
    host: Host, prompts: Sequence[str], seeds: Sequence[int], count: int, from_step: int | None, eta: float
) -> Iterator[tuple[str, Tensor, Tensor, tuple[int, ...]]]:
    """Of each prompt latents [K, C, h, w] and pixels [K, 3, height, width], float32 on the CPU, and the K seeds."""
    all_seeds = [list(seeds)] * count
    if from_step is None:
        all_seeds[1:] = [[_other_seed(seed, number) for seed in seeds] for number in range(1, count)]

    def some(rows: range) -> tuple[Tensor, Tensor]:
        """[B, K, C, h, w] latents and [B, K, 3, height, width] pixels, on the CPU."""
        part = slice(rows.start, rows.stop)
        if from_step is None:
            plain = RolloutSettings(candidates=1, eta=eta)
            flat = [seed for row in all_seeds for seed in row[part]]
            final = host.rollout([*prompts[part]] * count, flat, plain, _NoPreference(), _ignore).x
            latents = final.unflatten(0, (count, -1)).transpose(0, 1)
        else:
            latents = _parted(host, prompts[part], seeds[part], count, from_step, eta)
        pixels = retry_with_less(
            lambda: host.decode(latents.flatten(0, 1)), lambda: halve_decode_batch(host), warnings.warn, _LESS_MEMORY
        )
        return latents.float().cpu(), pixels.unflatten(0, latents.shape[:2]).float().cpu()

    parts = in_portions(some, len(prompts), Portion("prompts at a time", len(prompts)), warnings.warn, _LESS_MEMORY)
    made = [pictures for latents, pixels in parts for pictures in zip(latents, pixels, strict=True)]
    for n, (prompt, (latents, pixels)) in enumerate(zip(prompts, made, strict=True)):
        yield prompt, latents, pixels, tuple(row[n] for row in all_seeds)


def _text(host: Host, prompt: str) -> Tensor:
    """[D] on the CPU, without a gradient or a mode of inference that would forbid one later."""
    return host.text_features([prompt])[0].detach().clone()


def _other_seed(seed: int, number: int) -> int:
    key = ("other picture",) if number == 1 else ("other picture", number)
    return stable_seed(seed, *key) % 2**32


def _step(from_step: int | None) -> int:
    return -1 if from_step is None else from_step


def _parted(host: Host, prompts: Sequence[str], seeds: Sequence[int], count: int, from_step: int, eta: float) -> Tensor:
    """[B, K, C, h, w] final latents of pictures that part ways at `from_step`."""
    seen: list[PoolVerdict] = []
    to_the_end = RolloutSettings(
        candidates=count, inner_steps=10_000, divert_start_step=from_step, eta=eta, threshold=float("inf")
    )
    host.rollout(prompts, seeds, to_the_end, _NoPreference(), seen.append)
    if len(seen) != 1 or seen[0].step != from_step:
        raise SpoError(f"from_step is {from_step}; accepted are steps of the ladder, from 0, that add noise.")
    return seen[0].candidates.prediction().transpose(0, 1)


def _ignore(verdict: PoolVerdict) -> None:
    """Pictures made without a pool have no verdict."""
