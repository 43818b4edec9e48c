"""Several processes as threads of the test: what `training.processes` says of them, without their faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Threads:
    """See `training.processes.Processes`. box: where each puts what it gives to the others."""

    def __init__(self, index: int, count: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.index, self.count, self.barrier, self.box = index, count, barrier, box

    def gather(self, work: Callable[[], T]) -> list[T]:
        try:
            self.box[self.index] = work()
        except BaseException:
            self.barrier.abort()
            raise
        self.barrier.wait()
        everything = list(self.box)
        self.barrier.wait()
        return everything

    def on_main(self, work: Callable[[], T]) -> T:
        return self.gather(work if self.index == 0 else lambda: None)[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        return self.gather(work)[self.index]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        mine = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in parameters]
        for parameter, gradients in zip(parameters, zip(*self.gather(lambda: mine), strict=True), strict=True):
            parameter.grad = torch.stack(gradients).sum(0)


def together(count: int, work: Callable[[Threads], T]) -> list[T]:
    """`work(processes)` in so many threads; what each gave."""
    barrier, box = threading.Barrier(count, timeout=300), [None] * count
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, Threads(index, count, barrier, box)) for index in range(count)]
        return [future.result() for future in futures]
