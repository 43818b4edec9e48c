"""Tensors born under `inference_mode`, as ordinary ones that autograd takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


def outside_inference(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function outside of `inference_mode`, without gradients: what it makes is ordinary."""

    @wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Result:
        with torch.inference_mode(False), torch.no_grad():  # the first alone would switch gradients on
            return function(*args, **kwargs)

    return outside


def ordinary(value: Any) -> Any:
    """A tensor of the same memory that autograd takes, or a dict of such; anything else as it is."""
    if isinstance(value, dict):
        values = {key: ordinary(one) for key, one in value.items()}
        return values if type(value) is dict else type(value)(values)
    return _alias(value) if isinstance(value, Tensor) and value.is_inference() else value


def _alias(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload, no-any-return]


def ordinary_weights(network: nn.Module) -> None:
    """Make weights and buffers of inference mode ordinary, in place and for good: the memory, so the values, stay.

    To be called again before each training step: the WebUI puts new weights in when it merges other LoRAs.
    """
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_inference():
                with torch.inference_mode(False):
                    module._parameters[name] = nn.Parameter(_alias(weight), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = ordinary(buffer)
