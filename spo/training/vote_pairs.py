"""Pairs of pictures to vote on, made by the host that will train: same prompt, different noise.

The first picture of a pair is the ordinary picture of its seed. The second one parts ways with it at a step: the same
seed with other noise from there on, as SPO's own candidates differ, or another seed altogether. A pair that parts ways
is one pool of two whose inner steps last to the end, so that it costs one window of `sample_spo` and works in every
host as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spo.algorithm.preference import Candidates
from spo.algorithm.rollout import PoolVerdict, RolloutSettings
from spo.errors import SpoError
from spo.preference.taste.votes import VotePair
from spo.rng import stable_seed
from spo.training.host import Host


class _NoPreference:
    """All candidates are worth the same: a pool that is only drawn, not judged."""

    name, needs_pixels, needs_denoised = "none", False, True

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(candidates.x.shape[:2], device=candidates.x.device)


def make_pairs(
    host: Host, prompts: Sequence[str], seeds: Sequence[int], from_step: int | None = 4, eta: float = 1.0
) -> list[VotePair]:
    """One pair for each prompt and seed, in one batch. The host must know the prompts (`prepare`).

    from_step  the pictures share their seed, and differ in the noise of this step and of all later ones; the earlier,
               the more they differ. None: two seeds, the second one derived from the first
    eta        noise of a step; must be above 0 with from_step

    Raises SpoError when from_step is not a step of the host's ladder that adds noise.
    """
    if from_step is None:
        rights = [stable_seed(seed, "other picture") % 2**32 for seed in seeds]
        plain = RolloutSettings(candidates=1, eta=eta)
        final = host.rollout([*prompts] * 2, [*seeds, *rights], plain, _NoPreference(), _ignore).x
        latents = final.unflatten(0, (2, -1)).transpose(0, 1)
    else:
        rights, latents = list(seeds), _parted(host, prompts, seeds, from_step, eta)
    pixels = host.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
    return [
        VotePair(
            prompt, latents[n].float().cpu(), pixels[n].float().cpu(), seeds[n], rights[n],
            -1 if from_step is None else from_step, host.architecture, host.checkpoint_name, host.checkpoint_hash,
        )
        for n, prompt in enumerate(prompts)
    ]  # fmt: skip


def _parted(host: Host, prompts: Sequence[str], seeds: Sequence[int], from_step: int, eta: float) -> Tensor:
    """[B, 2, C, h, w] final latents of pictures that part ways at `from_step`."""
    seen: list[PoolVerdict] = []
    to_the_end = RolloutSettings(
        candidates=2, inner_steps=10_000, divert_start_step=from_step, eta=eta, threshold=float("inf")
    )
    host.rollout(prompts, seeds, to_the_end, _NoPreference(), seen.append)
    if len(seen) != 1 or seen[0].step != from_step:
        raise SpoError(f"from_step is {from_step}; accepted are steps of the ladder, from 0, that add noise.")
    return seen[0].candidates.prediction().transpose(0, 1)


def _ignore(verdict: PoolVerdict) -> None:
    """Pictures made without a pool have no verdict."""
