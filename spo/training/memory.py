"""Out of memory: what can be done a smaller part at a time, results unchanged, is halved, and the run goes on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from spo.errors import SpoError

T = TypeVar("T")
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that a device, or the machine, has no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
    )


def free_memory() -> None:
    """Give back what nobody uses any more, so that the next try finds all there is."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Portions:
    """How much is done at a time; halved when memory runs out. The results stay the same.

    candidates  of each image in one network call, in rollouts
    decodes     pictures in one call of the VAE
    pairs       in one network call, in training
    """

    candidates: int
    decodes: int
    pairs: int

    def halve_rollout(self) -> str | None:
        """Less at a time in rollouts; says what, or None when nothing is left to halve."""
        if self.candidates == 1 and self.decodes == 1:
            return None
        self.candidates, self.decodes = (self.candidates + 1) // 2, (self.decodes + 1) // 2
        return f"candidates_per_call {self.candidates}, decode_batch {self.decodes}"

    def halve_training(self) -> str | None:
        """Fewer pairs in a call; likewise."""
        if self.pairs == 1:
            return None
        self.pairs = (self.pairs + 1) // 2
        return f"pairs_per_call {self.pairs}"


def retry_with_less(
    work: Callable[[], T], lessen: Callable[[], str | None], say: Callable[[str], None], advice: str
) -> T:
    """`work()`, again and again with less at a time while memory runs out.

    lessen  halves something and says what; None: nothing is left to halve
    Raises SpoError with `advice` when that is so; other errors pass through. `work` must be repeatable.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        now = lessen()
        if now is None:
            raise SpoError(f"Out of memory, with nothing left to do a smaller part at a time; {advice}.")
        free_memory()
        say(f"Out of memory: going on with {now}.")
