"""LoRAs that the WebUI merges into weights, by the names of modules, while an adapter of ours is among them.

peft puts a layer of its own around each module, so `to_q.weight` is called `to_q.base_layer.weight` then: what is not
found by its name would not be merged, or its backup not be put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn


@contextmanager
def adapters_aside(network: nn.Module) -> Iterator[None]:
    """Inside, the modules themselves are in the places of the adapter's layers around them. Not for computing."""
    layers = [
        (parent, name, layer)
        for parent in network.modules()
        for name, layer in parent.named_children()
        if hasattr(layer, "base_layer") and hasattr(layer, "lora_A")
    ]
    for parent, name, layer in layers:
        parent._modules[name] = layer.base_layer  # type: ignore[assignment]
    try:
        yield
    finally:
        for parent, name, layer in layers:
            parent._modules[name] = layer


@contextmanager
def plain_names_in(network: nn.Module, functions: Sequence[tuple[Any, str]]) -> Iterator[None]:
    """Inside, these functions of the WebUI's, (owner, name), run with the network's `adapters_aside`.

    Those that look modules up by name, or move and merge weights. Left out are an
    owner that is None, and what an owner lacks: WebUIs differ.
    """
    with ExitStack() as stack:
        for owner, name in functions:
            former = None if owner is None else vars(owner).get(name)
            if former is not None:
                setattr(owner, name, _aside(former, network))
                stack.callback(setattr, owner, name, former)
        yield


def _aside(function: Callable[..., Any], network: nn.Module) -> Callable[..., Any]:
    @wraps(function)
    def aside(*args: Any, **kwargs: Any) -> Any:
        with adapters_aside(network):
            return function(*args, **kwargs)

    return aside
