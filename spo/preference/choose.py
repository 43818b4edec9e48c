"""A taste without training: at every step the best of several candidates goes on.

The rollout of training (`algorithm.rollout`), with one thing changed: there the next parent is drawn at random, which
keeps the pairs diverse (paper, ablation); here it is the candidate with the highest score, and no pairs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spo.algorithm.preference import Candidates, PreferenceModel
from spo.algorithm.rollout import Draws, RolloutSettings, Scoring, sample_spo
from spo.errors import SpoError

MAX_CANDIDATES = 16


class _Best:
    """A preference model that remembers which candidate it liked best, and draws that let that one go on."""

    def __init__(self, preference: PreferenceModel, draws: Draws) -> None:
        self.preference, self.draws, self.name = preference, draws, preference.name
        self.needs_pixels, self.needs_denoised = preference.needs_pixels, preference.needs_denoised
        self.best = torch.empty(0, dtype=torch.int64)

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        scores = self.preference.score(candidates, prompts)
        self.best = scores.float().argmax(0)  # the first of equals, so that candidate 0 is the sampler's own
        return scores

    def noise(self, step: int, candidates: int, like: Tensor) -> Tensor:
        return self.draws.noise(step, candidates, like)

    def parents(self, step: int, candidates: int) -> Tensor:
        return self.best


def sample_best(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    preference: PreferenceModel,
    prompts: Sequence[str],
    candidates: int,
    draws: Draws,
    alphas_cumprod: Tensor,
    eta: float = 1.0,
    decode: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    text: Tensor | None = None,
) -> Tensor:
    """[B, C, H, W] final latents: ancestral sampling in which each step is the best of `candidates` draws.

    model is `model(x [B, C, H, W], sigma [B]) -> denoised`; the other arguments are as in `sample_spo`; prompts [B],
    text [B, D] their features (`Candidates`). A preference model of noisy latents needs one network evaluation a step,
    as plain sampling does; another one as many as there are candidates, one candidate at a time.
    Raises SpoError for fewer than 2 or more than `MAX_CANDIDATES`, and for eta 0, with which all would be the same.
    """
    if not 2 <= candidates <= MAX_CANDIDATES:
        raise SpoError(f"candidates is {candidates}; accepted are 2 to {MAX_CANDIDATES}.")
    if eta <= 0:
        raise SpoError(f"eta is {eta:g}: steps without noise have nothing to choose from; set it above 0.")
    best = _Best(preference, draws)
    settings = RolloutSettings(
        candidates=candidates, divert_start_step=0, threshold=float("inf"), eta=eta, candidates_per_call=1
    )
    scoring = Scoring(best, list(prompts), decode, text=text)
    return sample_spo(
        model, x, sigmas, callback=callback,
        settings=settings, draws=best, alphas_cumprod=alphas_cumprod, scoring=scoring,
    ).x  # fmt: skip
