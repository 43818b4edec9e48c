"""Win rates with their 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spo.errors import SpoError


@dataclass(frozen=True)
class WinRate:
    """How often a beats b: counts, and the rate (0 ... 1, ties count half) with its 95 % Wilson interval."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float

    def text(self) -> str:
        """`62 % (54 - 69 %), 74 won, 3 tied, 44 lost`, the interval in brackets."""
        return (
            f"{self.rate:.0%} ({self.low:.0%} - {self.high:.0%}), {self.wins} won, {self.ties} tied, {self.losses} lost"
        )


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float]) -> WinRate:
    """How often a's score is above b's, pair by pair (the same prompt and seed in both).

    The interval is `wilson_interval`'s with p = (wins + ties/2)/n.
    Raises SpoError when there is no pair or a score is not finite, ValueError for different numbers of scores.
    """
    if len(scores_a) != len(scores_b):
        raise ValueError(f"{len(scores_a)} scores against {len(scores_b)}")
    pairs = [(float(a), float(b)) for a, b in zip(scores_a, scores_b, strict=True)]
    if not pairs:
        raise SpoError("A win rate needs at least one pair of scores; there is none.")
    if not all(math.isfinite(a) and math.isfinite(b) for a, b in pairs):
        raise SpoError("A score is not finite, so there is no win rate: score in float32.")
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    count, ties = len(pairs), len(pairs) - wins - losses
    rate = (wins + ties / 2) / count
    low, high = wilson_interval(rate, count)
    return WinRate(wins, ties, losses, rate, low, high)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """(low, high) of Wilson's 95 % interval for a share, 0 ... 1, of `count` (at least 1) things.

    Wilson (1927): (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    z = 1.959963984540054
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
