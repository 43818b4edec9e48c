"""Several processes by Hugging Face Accelerate, each started by its launcher. Only their own runs import it.

Accelerate finds out who is who, opens the process group and gives each process its card. Two groups are made of it:

    meetings   always gloo, through the processors: objects and agreements. A process that dies closes its connections,
               which the others notice at once, so a meeting may be waited for as long as the others live.
    gradients  NCCL between cards, gloo between processors. Nobody waits here for another's work, since all have met
               just before; what does not come within `GRADIENTS_S` comes never.

Gradients are summed, not averaged: each process divides by the number of all pairs of an update, so the sum is the
average over pairs, however many each process had. They are summed before anything looks at them (loss scaling, norm),
so an overflow in one process is one in all.
"""

from __future__ import annotations

import io
import os
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spo.errors import SpoError
from spo.progress import StopRequested

T = TypeVar("T")
MEETINGS_S = 24 * 3600.0
GRADIENTS_S = 60.0
_BUCKET = 2**24  # elements of the gradient that are sent at a time


class ProcessLostError(SpoError):
    """Another process ended without a word, so this one cannot go on."""


class AcceleratedProcesses:
    """See `processes.Processes`.

    device     what this process computes on: "cuda:1" for the second of a machine, or "cpu"
    waiting_s  seconds spent in meetings until all were there; moving_s: and in sending; moved_bytes: by this process
    """

    def __init__(self, on_cpu: bool) -> None:
        if not on_cpu:
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # what comes too late raises; else it aborts
            os.environ.setdefault("NCCL_BLOCKING_WAIT", "1")  # its name before torch 2.2
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before anything else of CUDA
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu)
        self.index, self.count = state.process_index, state.num_processes
        self.local_index = state.local_process_index
        self.device = "cpu" if on_cpu else f"cuda:{self.local_index}"
        self._meetings = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=MEETINGS_S))
        self._gradients = torch.distributed.new_group(timeout=timedelta(seconds=GRADIENTS_S))
        self.waiting_s = self.moving_s = 0.0
        self.moved_bytes = 0
        self._known: BaseException | None = None  # raised by a meeting, so that all know of it

    def gather(self, work: Callable[[], T]) -> list[T]:
        """See `Processes`."""
        mine = self._agreed(work)
        parts: list[Any] = [None] * self.count
        self._move(lambda content: torch.distributed.all_gather_object(parts, content, group=self._meetings), mine)
        return [pickle.loads(part) for part in parts]

    def on_main(self, work: Callable[[], T]) -> T:
        """See `Processes`."""
        mine = self._agreed(work if self.index == 0 else lambda: None)
        parts: list[Any] = [None]

        def send(content: bytes) -> None:
            parts[0] = content
            torch.distributed.broadcast_object_list(parts, src=0, group=self._meetings)

        self._move(send, mine)
        return pickle.loads(parts[0])

    def in_turn(self, work: Callable[[], T]) -> T:
        """See `Processes`."""
        results: list[T] = []
        for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", self.count))):
            if turn == self.local_index:
                results.append(self._agreed(work))
            else:
                self._agreed(lambda: None)
        return results[0]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Processes`. In parts, so that large gradients need no second copy."""
        for some in _buckets(parameters):
            gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in some]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            began = time.monotonic()
            self._guarded(partial(torch.distributed.all_reduce, flat, group=self._gradients))
            self.moving_s += time.monotonic() - began
            self.moved_bytes += flat.numel() * flat.element_size()
            for parameter, summed in zip(some, flat.split([one.numel() for one in some]), strict=True):
                parameter.grad = summed.view_as(parameter)

    def told_of(self, error: BaseException) -> None:
        """All end together, because of `error`: the others learn of it at their next meeting unless it is from one."""
        if isinstance(error, ProcessLostError):
            return
        try:
            if error is not self._known:
                self._meet(error)
        except Exception as same:
            if isinstance(same, ProcessLostError):
                return
        self.part()

    def part(self) -> None:
        """The last meeting: the main process has written what it writes, and all may end."""
        with suppress(ProcessLostError):
            self._meet(None)
            torch.distributed.destroy_process_group()  # its threads, where Python ends before them, can abort a process

    def is_first_to_say(self, text: str) -> bool:
        """Whether no other process has said this text before; the launcher keeps the list, also when a process dies."""
        store = torch.distributed.distributed_c10d._get_default_store()
        try:
            return store.add(f"spo/said/{text}", 1) == 1
        except RuntimeError:  # the launcher is gone, too
            return True

    def _agreed(self, work: Callable[[], T]) -> T:
        """`work()`, and the meeting after it."""
        error, result = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        self._meet(error)
        return result  # type: ignore[return-value]

    def _meet(self, error: BaseException | None) -> None:
        """Wait until all are here. Raises the error of this process, else what that of another one says."""
        words = None if error is None else (*_kind_of(error), self.index)
        heard: list[Any] = [None] * self.count
        began = time.monotonic()
        self._guarded(lambda: torch.distributed.all_gather_object(heard, words, group=self._meetings))
        self.waiting_s += time.monotonic() - began
        errors = [one for one in heard if one is not None]
        if not errors:
            return
        graver = [one for one in errors if one[0] != "stop"]
        if error is not None and (not graver or not isinstance(error, StopRequested)):
            self._known = error
        elif graver:
            kind, text, index = graver[0]
            self._known = SpoError(text if kind == "spo" else f"Process {index} of {self.count} failed: {text}")
        else:
            self._known = StopRequested()
        raise self._known

    def _move(self, send: Callable[[bytes], None], content: object) -> None:
        buffer = io.BytesIO()
        _Pickler(buffer).dump(content)
        began = time.monotonic()
        self._guarded(lambda: send(buffer.getvalue()))
        self.moving_s += time.monotonic() - began
        self.moved_bytes += buffer.tell()

    def _guarded(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:  # of gloo and of NCCL alike: a connection that closed, or nothing came
            self._known = ProcessLostError(
                "Another process of this run ended without a word (killed, or out of main memory), so all end; "
                "a training run goes on from its last state with --resume."
            )
            raise self._known from error


class _Pickler(pickle.Pickler):
    """Tensors travel on the CPU, and without the rest of the tensor that they are a part of."""

    def reducer_override(self, item: object) -> Any:
        if isinstance(item, Tensor):
            flat = item.detach().cpu().contiguous().flatten()
            return _tensor, (flat.view(torch.uint8).numpy().tobytes(), item.dtype, tuple(item.shape))
        return NotImplemented


def _tensor(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def _kind_of(error: BaseException) -> tuple[str, str]:
    if isinstance(error, StopRequested):
        return "stop", ""
    return ("spo", str(error)) if isinstance(error, SpoError) else ("other", f"{type(error).__name__}: {error}")


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        if buckets[-1] and sum(one.numel() for one in buckets[-1]) + parameter.numel() > _BUCKET:
            buckets.append([])
        buckets[-1].append(parameter)
    return buckets if parameters else []
