"""How sure a mean is: the bootstrap over prompts.

Pictures of one prompt resemble each other, so that more seeds of the same prompts say less than their number: what is
drawn again is prompts, each with all its seeds (the cluster bootstrap, Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.rng import generator


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; low and high are NaN where there are fewer than two prompts."""

    mean: float
    low: float
    high: float

    def text(self, form: str = ".3g") -> str:
        """`0.91 (0.88 to 0.94)`."""
        mean, ends = self.parts(form)
        return f"{mean} ({ends})" if ends else mean

    def parts(self, form: str = ".3g") -> tuple[str, str]:
        """`0.91` and `0.88 to 0.94`, which is empty where the interval is not known."""
        ends = f"{self.low:{form}} to {self.high:{form}}" if math.isfinite(self.low) else ""
        return format(self.mean, form), ends


def bootstrap_interval(
    values: Tensor | Sequence[float],
    prompts: Sequence[Hashable] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of `values` and its 95 % percentile interval (2.5 and 97.5 %) over prompts drawn with replacement.

    values     [N], one for each picture, or one for each prompt; NaN counts as missing
    prompts    N of them: equal ones are drawn together, whose pictures all count; None: every value is a prompt's
    resamples  draws; seed: of the draws, so that the same values give the same interval

    The mean is over pictures. Where all prompts agree the interval has no width, which says less than it seems.
    Raises ValueError when there is no value, or prompts are not as many.
    """
    flat = torch.as_tensor(values, dtype=torch.float64, device="cpu").flatten()
    names: Sequence[Hashable] = range(len(flat)) if prompts is None else prompts
    if len(names) != len(flat):
        raise ValueError(f"{len(names)} prompts for {len(flat)} values")
    present = flat.isfinite()
    numbers: dict[Hashable, int] = {}
    rows = [row for row in range(len(flat)) if present[row]]
    if not rows:
        raise ValueError("no value to take the mean of")
    of_prompt = torch.tensor([numbers.setdefault(names[row], len(numbers)) for row in rows])
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, of_prompt, flat[rows])
    counts = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, of_prompt, torch.ones(len(rows)).double())
    mean = float(sums.sum() / counts.sum())
    if len(numbers) < 2:
        return Interval(mean, math.nan, math.nan)
    drawn = torch.randint(len(numbers), (resamples, len(numbers)), generator=generator(seed, "bootstrap"))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)
