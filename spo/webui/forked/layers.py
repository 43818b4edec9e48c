"""Layers of a Forge's UNet that peft or the backward pass do not take as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def linear_for_peft(network: nn.Module) -> Iterator[None]:
    """Inside, a Linear that is not torch's is both: it computes as its own does, and peft sees a `torch.nn.Linear`.

    Only the class of the modules changes, to a subclass; afterwards it is their own again.
    """
    foreign = [
        module
        for module in network.modules()
        if type(module).__name__ == "Linear" and not isinstance(module, nn.Linear) and hasattr(module, "in_features")
    ]
    classes: list[Any] = [type(module) for module in foreign]
    for module, kind in zip(foreign, classes, strict=True):
        module.__class__ = _both(kind)
    try:
        yield
    finally:
        for module, kind in zip(foreign, classes, strict=True):
            module.__class__ = kind


@cache
def _both(kind: Any) -> Any:
    return type(kind.__name__, (kind, nn.Linear), {"__module__": kind.__module__})


@contextmanager
def adding_in_place(network: nn.Module) -> Iterator[None]:
    """Inside, transformer blocks that add to their input in place can be differentiated.

    Their norms keep what they got for the backward pass, and `x += n` would change it: they get a copy, while
    gradients are on.
    """
    norms = [
        norm
        for block in network.modules()
        if type(block).__name__ == "BasicTransformerBlock"
        for name, norm in block.named_children()
        if name.startswith("norm")
    ]
    handles = [norm.register_forward_pre_hook(_copied) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(norm: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x: Tensor = inputs[0]
    return (x.clone(), *inputs[1:]) if torch.is_grad_enabled() and x.requires_grad else None
