"""Progress and stop: what long work tells whoever watches it, and how it is asked to end. One of the three seams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spo.algorithm.rollout import PoolVerdict


class StopRequested(Exception):  # noqa: N818 - not an error
    """Raised inside a rollout when the user wants to stop; the rollout is done again on resume."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: when it is resumed, and after each rollout, each update and each check.

    phase  "rollout", "training" or "validation"; fraction 0 ... 1 of the whole run; eta_s None until known
    metrics  the last finished row of metrics.csv; checks: all rows of validation.csv
    """

    phase: str
    step: int
    batch: int
    fraction: float
    eta_s: float | None
    metrics: dict[str, float]
    checks: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class Watcher:
    """Progress and stop, the third seam. All are optional.

    should_stop  asked between updates and between steps of a rollout; True: save and end
    make_way     asked between rollouts, after at least one; True: save and return, to be resumed soon
    sample_now   asked between updates; True: sample pictures once
    saved        called with every LoRA file that was written, while the adapter is still in place
    """

    progress: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    make_way: Callable[[], bool] = lambda: False
    sample_now: Callable[[], bool] = lambda: False
    verdict: Callable[[PoolVerdict], None] = lambda verdict: None
    log: Callable[[str], None] = lambda text: None
    saved: Callable[[Path], None] = lambda path: None
