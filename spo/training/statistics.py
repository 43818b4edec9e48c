"""What a row of metrics.csv is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from spo.algorithm.objective import PairLoss
from spo.algorithm.rollout import PoolScores
from spo.runs.metrics import TIMESTEP_PREFIX
from spo.runs.state import PlainState
from spo.training.schedule import Position


@dataclass
class BatchStatistics(PlainState):
    """Sums over one rollout and the training after it: what a row of metrics is made of."""

    rollout: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    ratio_win: list[float] = field(default_factory=list)
    ratio_lose: list[float] = field(default_factory=list)
    clamped: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    train_seconds: float = 0.0
    rollout_seconds: float = 0.0
    pairs: int = 0
    images: int = 0

    def add_results(self, results: Sequence[PairLoss]) -> None:
        """Of one update."""
        for result in results:
            self.losses += result.loss.tolist()
            self.ratio_win += result.ratio_win.tolist()
            self.ratio_lose += result.ratio_lose.tolist()
            self.clamped += result.clamped.float().tolist()

    def row(self, position: Position, batches: int, rate: float) -> dict[str, float | int | None]:
        """One row of metrics, see `metrics.TITLES`. batches: of an epoch; rate: the learning rate."""
        seconds = self.rollout_seconds + self.train_seconds
        return {
            "batch": position.batch,
            "step": position.step,
            "epoch": position.batch // batches,
            "images": position.images,
            "preference_mean": self.rollout.get("mean"),
            "kept_share": self.rollout.get("kept"),
            "pairs": self.pairs,
            "loss": _mean(self.losses),
            "ratio_win": _mean(self.ratio_win),
            "ratio_lose": _mean(self.ratio_lose),
            "ratio_clamped_share": _mean(self.clamped),
            "gradient_norm": _mean(self.gradient_norms),
            "learning_rate": rate,
            "images_per_s": self.images / seconds if seconds else None,
            "pairs_per_s": self.pairs / self.train_seconds if self.train_seconds else None,
            "seconds": position.seconds,
            **{name: value for name, value in self.rollout.items() if name.startswith(TIMESTEP_PREFIX)},
        }


def pool_statistics(pools: Sequence[PoolScores]) -> dict[str, float]:
    """Of one rollout: mean score, share of kept verdicts, and mean scores by timestep; {} without pools."""
    if not pools:
        return {}
    by_timestep = {f"{TIMESTEP_PREFIX}{round(pool.timestep)}": float(pool.scores.mean()) for pool in pools}
    kept = torch.cat([pool.kept.float() for pool in pools])
    mean = torch.cat([pool.scores.flatten() for pool in pools]).mean()
    return {"mean": float(mean), "kept": float(kept.mean()), **by_timestep}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
