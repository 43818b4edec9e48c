"""Randomness as a function of (seed, position): no global generator, nothing to save, nothing that depends on batching.

Every random number of a run comes from a generator seeded by a stable hash of the run's seed and of what the number is
for: image 17's noise for candidate 2 of step 5 is the same whatever else is in the batch, and on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def stable_seed(*position: int | str) -> int:
    """A 63-bit seed, the same on every machine, for a position such as `(seed, "noise", image, step)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in position)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*position: int | str) -> torch.Generator:
    """A CPU generator for a position; draw on the CPU and move, so that every device sees the same numbers."""
    import torch

    return torch.Generator().manual_seed(stable_seed(*position))


def permutation(count: int, *position: int | str) -> list[int]:
    """A random order of `range(count)` for a position."""
    import torch

    return torch.randperm(count, generator=generator(*position)).tolist()


@dataclass(frozen=True)
class SeededDraws:
    """The draws of one rollout: one stream for each image (its seed) and step.

    seeds  one integer for each of the B images
    """

    seeds: Sequence[int]

    def initial(self, shape: Sequence[int]) -> Tensor:
        """[B, *shape] standard normal noise to start from; multiply it by the first sigma."""
        import torch

        return torch.stack([torch.randn(*shape, generator=generator(seed, "initial")) for seed in self.seeds])

    def noise(self, step: int, candidates: int, like: Tensor) -> Tensor:
        """[candidates, B, C, H, W] standard normal noise for the transition out of step `step`.

        like  [B, C, H, W]: gives shape, dtype and device
        """
        import torch

        drawn = [
            [torch.randn(like.shape[1:], generator=generator(seed, "noise", step, k)) for seed in self.seeds]
            for k in range(candidates)
        ]
        return torch.stack([torch.stack(row) for row in drawn]).to(device=like.device, dtype=like.dtype)

    def parents(self, step: int, candidates: int) -> Tensor:
        """[B] which candidate of the pool that ended with step `step` goes on, uniform over 0 ... candidates - 1."""
        import torch

        return torch.cat(
            [torch.randint(candidates, (1,), generator=generator(seed, "parent", step)) for seed in self.seeds]
        )
