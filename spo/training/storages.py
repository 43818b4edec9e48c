"""Facts about tensors' storages, kept for as long as the storages live and holding none of them alive."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Fact = TypeVar("Fact")


class StorageFacts(Generic[Fact]):
    """One fact for each storage, by identity: views, and what an in-place operation returns, share theirs.

    What has died is told by `sweep`, not by a callback: finalizers of storages are not called in PyTorch 2.1. A weak
    reference keeps the storage's address (not its memory) from being given to another one.
    """

    def __init__(self) -> None:
        self._facts: dict[int, tuple[StorageWeakRef, Fact]] = {}

    def __len__(self) -> int:
        return len(self._facts)

    def get(self, tensor: Tensor) -> Fact | None:
        """The fact about the tensor's storage, None when there is none."""
        entry = self._facts.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[1]

    def put(self, tensor: Tensor, fact: Fact) -> None:
        """Keep a fact about the tensor's storage, instead of an earlier one."""
        storage = tensor.untyped_storage()
        self._facts[storage._cdata] = (StorageWeakRef(storage), fact)

    def drop(self, tensor: Tensor) -> None:
        """Forget the tensor's storage; nothing happens when there is no fact about it."""
        self._facts.pop(tensor.untyped_storage()._cdata, None)

    def sweep(self, newest: int | None = None) -> list[Fact]:
        """Forget storages that no longer exist, among the `newest` ones or all; their facts."""
        expired = torch.UntypedStorage._expired  # type: ignore[attr-defined]
        keys = reversed(self._facts) if newest is None else islice(reversed(self._facts), newest)
        dead = [key for key in keys if expired(self._facts[key][0].cdata)]
        return [self._facts.pop(key)[1] for key in dead]


@cache
def _is_tensor(kind: type) -> bool:
    return issubclass(kind, Tensor)  # remembered for speed: asking each tensor is slow


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors among an operator's arguments or results: themselves, or in lists, tuples and dicts."""
    tensors: list[Tensor] = []
    for value in values:
        kind = type(value)
        if _is_tensor(kind):  # type: ignore[arg-type]
            tensors.append(value)
        elif kind is tuple or kind is list:
            tensors += tensors_in(*value)
        elif kind is dict:
            tensors += tensors_in(*value.values())
    return tensors
