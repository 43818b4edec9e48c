"""The SPO loss. Paper, eq. 8; DPO on single denoising transitions.

Deliberate differences from the published code, values unchanged: the clamp acts on log-ratios, whose gradient stays
finite at extreme ratios (exp -> clamp -> log gives NaN there).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
