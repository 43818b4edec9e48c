"""What a run needs of a card's memory, phase by phase, before it begins.

The run's own code goes once through loading, encoding, a rollout and an update, on the imaginary card: with the shapes
of the checkpoint and no memory, also where there is no card at all. Done is as little of each as the peak needs: one
portion of prompts, one window of the ladder, two portions of pairs.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from spo.algorithm.diffusion import scaled_linear_alphas_cumprod
from spo.algorithm.pairs import Pairs
from spo.algorithm.preference import Candidates, PreferenceModel
from spo.algorithm.rollout import pool_starts
from spo.config import Config
from spo.headless.device import choose_device
from spo.headless.host import load_host
from spo.lora.adapter import Adapter, modules_of_kinds
from spo.preference.load import load_preference
from spo.progress import Watcher
from spo.training.gradient import accumulate_gradient, configured_loss
from spo.training.host import ladder_of, rollout_settings
from spo.training.imaginary_card import imaginary_card
from spo.training.loop import optimizer_step, portions_of, roll_out
from spo.training.memory_ruler import Ruler
from spo.training.optimizer import make_optimizer, make_scaler

PHASES = ("load", "encode", "rollout", "decode", "score", "train")
# What a card needs beside the tensors: CUDA's context and kernels (0.3 to 0.6 GiB), and pieces that nothing fits into.
RESERVE_GIB = 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class MemoryPlan:
    """phases_gib: the most memory in tensors and kernels' workspaces in each of PHASES, weights included; precision: of
    the network. Comparable with `torch.cuda.max_memory_allocated`."""

    phases_gib: dict[str, float]
    precision: str

    @property
    def peak_gib(self) -> float:
        """Of the largest phase."""
        return max(self.phases_gib.values())

    def fits(self, card_gib: float) -> bool:
        """Whether a card of that size has room, with RESERVE_GIB for the driver."""
        return self.peak_gib + RESERVE_GIB <= card_gib

    def text(self, card_gib: float | None = None) -> str:
        """Lines for people."""
        largest = max(self.phases_gib, key=lambda name: self.phases_gib[name])
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in self.phases_gib.items())
        lines = [f"memory      {self.peak_gib:.1f} GiB of a card in {self.precision}, in {largest}: {parts}"]
        if card_gib is not None:
            verdict = "fits" if self.fits(card_gib) else "does not fit"
            lines.append(f"card        {card_gib:g} GiB, {RESERVE_GIB:g} of it for the driver: {verdict}")
        return "\n".join(lines)


def count_memory(config: Config, prompts: Sequence[str], *, on_card: bool = False) -> MemoryPlan:
    """Go through a run of this configuration on the imaginary card. Some seconds; half a minute for SDXL.

    on_card  plan for a CUDA card, whatever is here; else for the configured device, and if that is the CPU, as a card
             would need it in the CPU's precision

    Raises SpoError for what the run itself would refuse.
    """
    batch = min(config.optimizer.prompts_per_batch, len(prompts))
    waiting_bytes = batch * _pair_bytes(config)
    if not on_card and choose_device(config.model.device).type == "cpu":
        config = _in_precision_of_cpu(config)
    config = _rehearsal(config)
    portions = portions_of(config)
    some = list(prompts[: max(1, min(portions.prompts.size, len(prompts)))])
    watcher = Watcher()
    with warnings.catch_warnings(), imaginary_card() as card, Ruler(card.type) as ruler:
        warnings.simplefilter("ignore")  # of PyTorch, about CUDA that is not there; the run repeats ours

        with ruler.phase("load"):
            host = load_host(config)
            preference: PreferenceModel = load_preference(config, host.device, host.architecture)
        host.decode = _in_phase(ruler, "decode", host.decode)  # type: ignore[method-assign]
        preference = _ScoredInPhase(preference, ruler)
        with ruler.phase("encode"):
            host.prepare(some)

        # the adapter, and the optimizer as after its first step: with its moments
        adapter = Adapter(
            host.network, modules_of_kinds(host.network, config.lora.modules),
            rank=config.lora.rank, alpha=config.lora.alpha, seed=config.run.seed,
        )  # fmt: skip
        optimizer = make_optimizer(adapter.parameters(), config.optimizer)
        scaler = make_scaler(host.device, host.dtype)
        with ruler.phase("train"):
            for parameter in adapter.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer_step(optimizer, scaler, adapter, watcher)
            optimizer.zero_grad(set_to_none=True)

        waiting = torch.empty(waiting_bytes, dtype=torch.uint8, device=card)  # a whole rollout's pairs
        with ruler.phase("rollout"):
            rollout = roll_out(host, config, some, list(range(len(some))), preference, portions, watcher)
        with ruler.phase("train"):
            assert rollout.pairs is not None  # on the imaginary card every pair is kept
            pairs = _hardest(rollout.pairs, 2 * portions.pairs.size)
            accumulate_gradient(host, adapter, pairs, some, config, configured_loss(config), portions, scaler)
            optimizer_step(optimizer, scaler, adapter, watcher)
        del waiting
    precision = str(host.dtype).removeprefix("torch.")
    return MemoryPlan({name: ruler.phases[name].total_gib for name in PHASES if name in ruler.phases}, precision)


def _in_precision_of_cpu(config: Config) -> Config:
    precision = "float32" if config.model.precision == "auto" else config.model.precision
    chosen = config.preference.preference_precision
    preference = dataclasses.replace(config.preference, preference_precision="float32" if chosen == "auto" else chosen)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, precision=precision), preference=preference
    )


def _rehearsal(config: Config) -> Config:
    """The run on a short ladder: one ordinary step, one window and its end."""
    rollout = dataclasses.replace(
        config.rollout,
        sigmas="ddim", sampling_steps=config.rollout.inner_steps + 3, divert_start_step=1, timestep_min=0,
        timestep_max=1000,
    )  # fmt: skip
    model = dataclasses.replace(config.model, device="cuda", compile=False)
    return dataclasses.replace(config, rollout=rollout, model=model)


def _pair_bytes(config: Config) -> int:
    """What the pairs of one prompt take while they wait for their update, if every verdict is kept."""
    alphas = scaled_linear_alphas_cumprod()
    windows = pool_starts(ladder_of(config, alphas), alphas, rollout_settings(config))
    transitions = sum(end - start + 1 for start, end in windows)
    latent = 4 * (config.prompt.height // 8) * (config.prompt.width // 8)
    return transitions * 4 * latent * 4  # where both sides start and end, float32


def _hardest(pairs: Pairs, count: int) -> Pairs:
    """`count` of the pairs, first those whose sides start from latents of their own."""
    order = pairs.shared.int().argsort(stable=True)
    return pairs.rows(order[:count])


def _in_phase(ruler: Ruler, name: str, call: Callable[..., T]) -> Callable[..., T]:
    def inside(*args: Any, **kwargs: Any) -> T:
        with ruler.phase(name):
            return call(*args, **kwargs)

    return inside


class _ScoredInPhase:
    """A `PreferenceModel` whose verdicts are a phase of their own."""

    def __init__(self, model: PreferenceModel, ruler: Ruler) -> None:
        self.name, self.needs_pixels, self.needs_denoised = model.name, model.needs_pixels, model.needs_denoised
        self._score = _in_phase(ruler, "score", model.score)

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B]; see `PreferenceModel`."""
        return self._score(candidates, prompts)
