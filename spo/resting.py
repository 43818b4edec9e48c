"""Networks that are needed only now and then: their weights rest in main memory and come to the device for the use.

The preference model and the VAE work once a step of a rollout, and not at all while a LoRA is trained; on a small card
their place is worth more than the copying. Weights rest in page-locked memory, from which a GPU fetches them at the
full speed of its bus; they are frozen, so nothing has to be copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Weight:
    """A parameter or buffer by the module and the name it has there, and its value at rest."""

    module: nn.Module
    name: str
    at_rest: Tensor

    def set(self, value: Tensor) -> None:
        is_parameter = self.name in self.module._parameters
        setattr(self.module, self.name, nn.Parameter(value, requires_grad=False) if is_parameter else value)


class Resting:
    """A frozen network's weights at rest in main memory, on `device` within `awake`.

    moves  which weights come to the device, by their names in `network`; the others are left where they are
    """

    def __init__(
        self, network: nn.Module, device: torch.device, moves: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.device, self._uses = device, 0
        self._weights: list[_Weight] = []
        for path, module in network.named_modules():
            for name, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is not None and moves(f"{path}.{name}" if path else name):
                    self._weights.append(_Weight(module, name, _at_rest(value.detach(), device)))
        self._rest()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Within, the weights are on the device; the inner one of two does nothing."""
        self._uses += 1
        try:
            if self._uses == 1:
                for weight in self._weights:
                    weight.set(weight.at_rest.to(self.device, non_blocking=True))
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:  # also when memory ran out half way
                self._rest()

    def _rest(self) -> None:
        for weight in self._weights:
            weight.set(weight.at_rest)


def _at_rest(value: Tensor, device: torch.device) -> Tensor:
    value = value.to("cpu")
    if device.type != "cuda":
        return value
    try:
        return value.pin_memory()
    except RuntimeError:  # the system locks no more of it: copying is slower, and works
        return value
