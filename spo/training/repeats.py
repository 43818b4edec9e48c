"""What a network does again and again is counted once, since without gradient it takes the same memory each time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from spo.training.memory_ruler import Rise, Ruler


def counted_once(
    ruler: Ruler, call: Callable[..., Any], state: Callable[[], Hashable] = lambda: None
) -> Callable[..., Any]:
    """`call`, which is run for the first arguments of each shape; for more of them the ruler notes the same rise again,
    and the results are empty. With gradient, where it leaves a graph behind, it is always run.

    call   gives a tuple of new tensors, and leaves nothing else behind
    state  what its memory depends on beside the arguments, such as whether an adapter is on
    """
    known: dict[Hashable, tuple[Rise, list[tuple[Any, ...]]]] = {}

    def once(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return call(*args, **kwargs)
        key = (state(), _shapes(args), _shapes(kwargs))
        if key not in known:
            with ruler.rise() as rise:
                results = call(*args, **kwargs)
            known[key] = (rise, [(one.size(), one.stride(), one.dtype, one.device) for one in results])
            return results
        rise, layouts = known[key]
        ruler.note(rise)
        return tuple(
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype, device in layouts
        )

    return once


def _shapes(item: Any) -> Hashable:
    """Something to look arguments up by: of a tensor all that memory depends on."""
    if isinstance(item, Tensor):
        return (item.size(), item.stride(), item.dtype, item.device)
    if isinstance(item, dict):
        return tuple((name, _shapes(value)) for name, value in item.items())
    return tuple(map(_shapes, item)) if isinstance(item, list | tuple) else item
