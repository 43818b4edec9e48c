"""Pairs on their way from the rollouts to the updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spo.algorithm.pairs import Pairs


@dataclass
class PendingPairs:
    """Pairs that were sampled and not yet trained on, in the order of their use.

    pairs    None: none; prompts: those that `pairs.image` points into; of: how many there were after the last rollout
    """

    pairs: Pairs | None = None
    prompts: list[str] = field(default_factory=list)
    of: int = 0

    def __len__(self) -> int:
        return 0 if self.pairs is None else len(self.pairs)

    @property
    def share_done(self) -> float:
        """0 ... 1 of those after the last rollout."""
        return (self.of - len(self)) / self.of if len(self) else 0.0

    def add(self, pairs: Pairs, prompts: Sequence[str]) -> None:
        """New ones go behind those that are left."""
        if self.pairs is None:
            self.pairs, self.prompts = pairs, list(prompts)
        else:
            images = self.pairs.image.tolist()
            rows = list(dict.fromkeys(images))  # prompts that nothing is left of are forgotten
            image = self.pairs.image.new_tensor([rows.index(one) for one in images])
            left = dataclasses.replace(self.pairs, image=image)
            self.pairs = Pairs.cat([left, dataclasses.replace(pairs, image=pairs.image + len(rows))])
            self.prompts = [*(self.prompts[row] for row in rows), *prompts]
        self.of = len(self.pairs)

    def first(self, count: int) -> Pairs:
        """The next `count`, or all."""
        assert self.pairs is not None
        return self.pairs.rows(torch.arange(min(count, len(self.pairs)), device=self.pairs.sigma.device))

    def drop(self, count: int) -> None:
        """Take the next `count` away: they were trained on."""
        assert self.pairs is not None
        rest = torch.arange(count, len(self.pairs), device=self.pairs.sigma.device)
        self.pairs = self.pairs.rows(rest) if len(rest) else None

    def state_dict(self) -> dict[str, Any]:
        """See `runs.state.Stateful`."""
        tensors = None if self.pairs is None else self.pairs.tensors()
        return {"pairs": tensors, "prompts": self.prompts, "of": self.of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `runs.state.Stateful`; on the CPU until `to`."""
        self.pairs = None if state["pairs"] is None else Pairs(**state["pairs"])
        self.prompts, self.of = list(state["prompts"]), state["of"]

    def to(self, device: torch.device) -> None:
        """Move the pairs."""
        self.pairs = None if self.pairs is None else self.pairs.to(device)
