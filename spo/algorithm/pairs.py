"""Win-lose pairs: choosing them from a pool's scores, and holding them for training. Paper, section 3.2."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The verdict on one pool.

    win, lose  [B] int64, candidate index of the best and of the worst score
    kept       [B] bool, whether the two differ enough to teach anything
    gap        [B] float32, softmax([s_best, s_worst]) of the best minus that of the worst, 0 ... 1
    """

    win: Tensor
    lose: Tensor
    kept: Tensor
    gap: Tensor


def select_pairs(scores: Tensor, threshold: float) -> Selection:
    """Best and worst of each pool, kept when their softmax probabilities differ by more than `threshold`.

    scores  [K, B] preference scores, K >= 2. Of equal scores the first wins and the last loses, as published.
    """
    scores = scores.float()
    order = scores.sort(dim=0, descending=True, stable=True).indices
    win, lose = order[0], order[-1]
    both = torch.stack([scores.gather(0, win[None])[0], scores.gather(0, lose[None])[0]])
    probability = both.softmax(0)
    gap = probability[0] - probability[1]
    return Selection(win, lose, gap > threshold, gap)


@dataclass(frozen=True)
class Pairs:
    """P win-lose pairs, each a transition from noise level sigma to sigma_next. Latents are VE.

    x_win, x_lose        [P, C, H, W] where the winner's and the loser's transition start
    next_win, next_lose  [P, C, H, W] where they end
    shared               [P] bool, x_win equals x_lose, so that one network evaluation serves both sides
    sigma, sigma_next    [P] float32
    image                [P] int64, which image of the rollout (row of the conditioning)
    step                 [P] int64, which step of the ladder
    gap                  [P] float32, how clear the verdict was (Selection.gap)
    """

    x_win: Tensor
    x_lose: Tensor
    next_win: Tensor
    next_lose: Tensor
    shared: Tensor
    sigma: Tensor
    sigma_next: Tensor
    image: Tensor
    step: Tensor
    gap: Tensor

    def __len__(self) -> int:
        return len(self.sigma)

    def rows(self, index: Tensor | Sequence[int]) -> Pairs:
        """The pairs of `index`, in its order."""
        return Pairs(**{name: value[index] for name, value in self.tensors().items()})

    def to(self, device: torch.device | str) -> Pairs:
        """The same on another device."""
        return Pairs(**{name: value.to(device) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, for saving."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @staticmethod
    def cat(parts: Sequence[Pairs]) -> Pairs:
        """One after the other; at least one part."""
        return Pairs(
            **{
                field.name: torch.cat([getattr(part, field.name) for part in parts])
                for field in dataclasses.fields(Pairs)
            }
        )
