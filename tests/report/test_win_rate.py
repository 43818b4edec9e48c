"""Win rates against published and hand-derived intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spo.errors import SpoError
from spo.report.win_rate import win_rate


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_as_newcombe_published(wins, count, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (Wilson's score interval)."""
    result = win_rate([1.0] * count, [0.0] * wins + [2.0] * (count - wins))
    assert (result.wins, result.ties, result.losses) == (wins, 0, count - wins)
    assert result.low == pytest.approx(low, abs=5e-5)
    assert result.high == pytest.approx(high, abs=5e-5)


def test_ties_count_half():
    """At rate 1/2 the interval is 1/2 +- z / (2 sqrt(n + z^2)); with z^2 = 3.8415 and n = 10 that is 0.2634."""
    for a in ([1.0] * 10, [1.0, 3.0] * 5, [1.0, 3.0, 2.0, 2.0, 2.0] * 2):
        b = [1.0] * 10 if a == [1.0] * 10 else [2.0] * 10
        result = win_rate(a, b)
        assert result.rate == 0.5
        assert result.low == pytest.approx(0.2366, abs=5e-5)
        assert result.high == pytest.approx(0.7634, abs=5e-5)
    assert (result.wins, result.ties, result.losses) == (2, 6, 2)
    assert win_rate([3, 2], [1, 2]).rate == 0.75


def test_scores_are_paired_and_can_be_arrays():
    a, b = np.array([1.0, 5.0, 2.0]), np.array([2.0, 4.0, 1.0])
    assert win_rate(a, b).wins == 2 and win_rate(b, a).wins == 1
    assert win_rate(b, a[[2, 0, 1]]).wins == 1
    assert win_rate(a, b).low == pytest.approx(1 - win_rate(b, a).high)
    assert win_rate(a, b).text().startswith("67% (21% - 94%), 2 won, 0 tied, 1 lost")


def test_what_has_no_win_rate():
    with pytest.raises(SpoError, match="at least one pair"):
        win_rate([], [])
    with pytest.raises(SpoError, match="not finite"):
        win_rate([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="2 scores against 1"):
        win_rate([1.0, 2.0], [1.0])
