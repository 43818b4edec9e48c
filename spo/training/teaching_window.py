"""Pools only where they teach: a range of timesteps, learnt while training from the share of pairs that was kept.

A pool whose best and worst hardly differ gives no pair and costs as much as any: K predictions where a step without a
pool costs one. So every SURVEY rollouts, the first among them, pools are drawn at all configured steps, and what each
step kept is counted, earlier surveys half as much each time. Between surveys pools are drawn only from the first to the
last step that keeps at least `share` of what the best one keeps. Ours; the paper's fixed range (from its step 4 on, at
timestep 751) is the same thought made once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from spo.algorithm.rollout import PoolScores
from spo.config import Config
from spo.runs.state import PlainState

SURVEY = 8  # rollouts


@dataclass
class TeachingWindow(PlainState):
    """A survivor of the run's state: what the pools of each step gave, in the order of the ladder.

    share      of the best step's kept share, that a step must keep; 0: pools everywhere, and nothing is counted
    timesteps  at which each pool was scored, which is where the next one is drawn; kept, pools: counts, decayed
    """

    share: float
    timesteps: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    pools: list[float] = field(default_factory=list)

    def learn(self, pools: Sequence[PoolScores], batch: int) -> None:
        """Take what rollout `batch` kept, if it was a survey."""
        if not self.share or batch % SURVEY or not pools:
            return
        timesteps = [pool.timestep for pool in pools]
        if timesteps != self.timesteps:
            self.timesteps, self.kept, self.pools = timesteps, [0.0] * len(pools), [0.0] * len(pools)
        for number, pool in enumerate(pools):
            self.kept[number] = self.kept[number] / 2 + float(pool.kept.sum())
            self.pools[number] = self.pools[number] / 2 + len(pool.kept)

    def narrowed(self, config: Config, batch: int) -> Config:
        """The configuration of rollout `batch`: its range of timesteps is what was learnt, but for a survey."""
        shares = [kept / pools for kept, pools in zip(self.kept, self.pools, strict=True)]
        best = max(shares, default=0.0)
        if batch % SURVEY == 0 or not best:
            return config
        teaching = [number for number, share in enumerate(shares) if share >= self.share * best]
        first, last = teaching[0], teaching[-1]
        rollout = config.rollout
        if first > 0:  # drawn where the pool before it was scored
            rollout = replace(rollout, timestep_max=min(rollout.timestep_max, round(self.timesteps[first - 1]) + 1))
        if last < len(shares) - 1:
            rollout = replace(rollout, timestep_min=max(rollout.timestep_min, round(self.timesteps[last]) + 1))
        return replace(config, rollout=rollout)
