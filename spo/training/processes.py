"""Several processes that train one LoRA, a card each: what they tell one another, and how the work is dealt out.

All hold the same weights, pairs and position, and go through the same code. They meet where one needs what another has
made; between two meetings each is alone. A meeting is also where they agree on how it went: when the work of one
raises, all raise. So no process waits for one that has given up.

One process is the rule, and for it `Alone` does nothing. `training.accelerated` has the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import nn

T = TypeVar("T")


class Processes(Protocol):
    """index, count: 0 ... count - 1 of this process, and how many there are; number 0, the main one, writes files.

    Every process calls the same methods in the same order. When the work of one raises, that one raises its own
    exception and the others a `StopRequested` or SpoError that says the same.
    """

    index: int
    count: int

    def gather(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in each process, by index. With several processes all tensors in it are on the CPU."""
        ...

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in the main process, the only one that does it; tensors as in `gather`."""
        ...

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work` of this process, while the others of this machine wait for their turn or have had it."""
        ...

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every gradient becomes the sum of those of all processes, the same bits in all; None counts as zeros."""
        ...


class Alone:
    """The only process there is."""

    index, count = 0, 1

    def gather(self, work: Callable[[], T]) -> list[T]:
        """See `Processes`."""
        return [work()]

    def on_main(self, work: Callable[[], T]) -> T:
        """See `Processes`."""
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """See `Processes`."""
        return work()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Processes`."""


ALONE = Alone()


def share_of(processes: Processes, of: range) -> range:
    """Those of `of` that this process does: consecutive ones, as many as the others do or one less or more; it may be
    none. All shares one after the other are `of`.
    """
    index, count = processes.index, processes.count
    return of[len(of) * index // count : len(of) * (index + 1) // count]


def any_of(processes: Processes, here: bool) -> bool:
    """Whether it is so in any process."""
    return any(processes.gather(lambda: here))
