"""Training of a fixed number of steps that goes on to the bit where it was cut off, on a GPU or a CPU.

What a step draws depends on its stage and its number alone, and is drawn on the CPU: so no generator's state has to be
kept, and both kinds of device see the same pictures and noises. A run on a CPU is the same to the bit, whether it was
cut off or not; on a GPU up to the order in which its kernels add.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from spo.files import write_whole
from spo.rng import stable_seed


def run_steps(
    stage: str,
    steps: int,
    objects: Mapping[str, Any],
    step: Callable[[int], Mapping[str, float]],
    *,
    work: Path,
    save_every: int,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Call `step(n)` for each n below `steps` that is not done yet, with torch's generator seeded for it.

    objects  name -> what has a state_dict: networks, optimizer; saved in WORK/STAGE.state every `save_every` steps and
             at the end, and read from there first
    step     makes one update and returns numbers to print
    saved    called after each time
    """
    path, first = work / f"{stage}.state", 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        first = state["step"]
        for name, thing in objects.items():
            thing.load_state_dict(state["objects"][name])
        print(f"{stage}: {first} of {steps} steps are done", flush=True)
    began_s = time.monotonic()
    for number in range(first, steps):
        torch.manual_seed(stable_seed("demo checkpoint", stage, number))
        numbers = step(number)
        done = number + 1
        if done % save_every == 0 or done == steps:
            _save(path, done, objects)
            saved()
        if done % 100 == 0 or done == steps:
            text = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            seconds = time.monotonic() - began_s
            print(f"{stage}, step {done} of {steps}: {text}, {seconds / (done - first):.3f} s a step", flush=True)


def _save(path: Path, step: int, objects: Mapping[str, Any]) -> None:
    state = {"step": step, "objects": {name: thing.state_dict() for name, thing in objects.items()}}
    write_whole(path, lambda temporary: torch.save(state, temporary))


class AverageOf:
    """A moving average of a network's weights, faster in the beginning: decay min(most, (1 + n) / (10 + n))."""

    def __init__(self, network: torch.nn.Module, most: float = 0.999) -> None:
        self.network, self.most = network, most
        self.weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After update number `step`, counted from 1."""
        weight = 1 - min(self.most, (1 + step) / (10 + step))
        for name, tensor in self.network.state_dict().items():
            if tensor.is_floating_point():
                self.weights[name].lerp_(tensor, weight)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights, by the network's names."""
        return self.weights

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take weights of `state_dict`."""
        for name, tensor in state.items():
            self.weights[name].copy_(tensor)


def learning_rate(elapsed: float, peak: float, warm_up: float = 0.03) -> float:
    """Linear warm-up, then a cosine to zero, over the elapsed fraction of the run in [0, 1]."""
    if elapsed < warm_up:
        return peak * elapsed / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (elapsed - warm_up) / (1 - warm_up))))


@contextmanager
def updated(
    optimizer: torch.optim.Optimizer, network: torch.nn.Module, rate: float
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Inside, hand the loss to what is yielded: its gradient, clipped at norm 1, makes one update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    yield lambda loss: loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def precision_of(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where a GPU has it; float32 on a CPU, most of which have no instructions for bfloat16 and are slower."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()
