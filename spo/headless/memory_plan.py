"""What a run needs of a card's memory, phase by phase, before it begins.

The run's own code goes once through loading, encoding, a rollout, an update and a check, on the imaginary card: with
the shapes of the checkpoint and no memory, also where there is no card at all. Done is as little of each as the peak
needs, which more of the same leaves as it is:

- Encoded are as many prompts as the text encoders see at once, the longest; sampled is one portion of these.
- The ladder is one ordinary step, one window and its end. What the whole batch leaves waiting for its update - the
  pairs of the other prompts and of the steps left out - is put there in their place.
- Trained is one portion of pairs, the gradients of the portions before it in place.
- Of method dpo one portion of pictures is made and labelled, or one pair encoded; its batch of pairs is there whole.
- Checked are as many pictures as are sampled or judged at a time, by the judges that the configuration names.
- The network's calls without gradient, on arguments of one shape, are run once.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from spo.algorithm.diffusion import scaled_linear_alphas_cumprod
from spo.algorithm.pairs import Pairs
from spo.algorithm.preference import Candidates, PreferenceModel
from spo.algorithm.rollout import pool_starts
from spo.config import Config
from spo.headless.device import choose_device
from spo.headless.host import HeadlessHost, load_host
from spo.headless.text import CHUNK_ROWS, prompt_chunks
from spo.lora.adapter import Adapter, configured_adapter
from spo.preference.load import load_preference
from spo.progress import Watcher
from spo.training.finished_pairs import FinishedPairs, finished_pairs, noised
from spo.training.gradient import accumulate_gradient, configured_loss, taste_to_learn
from spo.training.host import ladder_of, rollout_settings
from spo.training.imaginary_card import imaginary_card
from spo.training.judges import load_judges
from spo.training.loop import optimizer_step, portions_of, roll_out
from spo.training.memory import Portions
from spo.training.memory_ruler import Ruler
from spo.training.optimizer import make_optimizer, make_scaler
from spo.training.pending import PendingPairs
from spo.training.repeats import counted_once
from spo.training.validation import JUDGED_AT_A_TIME, measure, prompts_of_checks

PHASES = ("load", "encode", "rollout", "decode", "score", "train", "check")
# What a card needs beside the tensors: CUDA's context and kernels (0.3 to 0.6 GiB), and pieces that nothing fits into.
RESERVE_GIB = 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class MemoryPlan:
    """phases_gib: the most memory in tensors and kernels' workspaces in each of PHASES that there is, weights included;
    precision: of the network. Comparable with `torch.cuda.max_memory_allocated`."""

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


def count_memory(config: Config, prompts: Sequence[str], *, on_card: bool = False, whole: bool = False) -> MemoryPlan:
    """Go through a run of this configuration on the imaginary card, in seconds.

    on_card  plan for a CUDA card, whatever is here; else for the configured device, and if that is the CPU, as a card
             would need it in the CPU's precision
    whole    a whole rollout and update, nothing left out: the same peaks but for a few latents, in minutes

    Raises SpoError for what the run itself would refuse.
    """
    if not on_card and choose_device(config.model.device).type == "cpu":
        config = _in_precision_of_cpu(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, device="cuda", compile=False))
    portions, settings = portions_of(config), config.optimizer
    by_length = sorted(zip(prompt_chunks(prompts), prompts, strict=True), key=lambda each: -len(each[0]))
    prompts = [prompt for _, prompt in by_length]
    is_dpo = config.loss.method == "dpo"
    batch = prompts[: settings.prompts_per_batch]
    per_update = settings.pairs_per_update * settings.accumulation
    waiting_pairs = 0
    if not whole:
        prompts, some = prompts[:CHUNK_ROWS], batch[: max(1, portions.prompts.size)]
        waiting_pairs = len(batch) * _transitions(config)
        config = _short(config)
        waiting_pairs = max(0, waiting_pairs - len(some) * _transitions(config))
        batch = batch if is_dpo else some
    watcher = Watcher()
    with warnings.catch_warnings(), imaginary_card() as card, Ruler(card.type) as ruler:
        warnings.simplefilter("ignore")  # of PyTorch, about CUDA that is not there; the run repeats ours

        with ruler.phase("load"):
            host = load_host(config)
            preference: PreferenceModel | None = None
            if config.preference.preference:
                preference = load_preference(config, host.device, host.architecture)
            judges = load_judges(config, host, lambda text: None)
        taste = taste_to_learn(config, preference)
        host.decode = _in_phase(ruler, "decode", host.decode)  # type: ignore[method-assign]
        if preference is not None:
            preference = _ScoredInPhase(preference, ruler)
        checked = _checked_prompts(config, prompts, portions.prompts.size) if judges else []
        with ruler.phase("encode"):
            host.prepare([*prompts, *(prompt for prompt in checked if prompt not in prompts)])

        # the adapter, and the optimizer as after its first step: with its moments
        adapter = configured_adapter(host.network, config)
        if not whole:
            host.network.forward = counted_once(ruler, host.network.forward, lambda: adapter.is_on)
        optimizer = make_optimizer(adapter.parameters(), settings)
        scaler = make_scaler(host.device, host.dtype)
        with ruler.phase("train"):
            _fill_gradients(adapter)
            optimizer_step(optimizer, scaler, adapter, watcher)
            optimizer.zero_grad(set_to_none=True)

        pending = PendingPairs()
        if is_dpo:
            with ruler.phase("rollout" if not config.preference.pairs else "encode"):
                _finished(host, config, batch[: max(1, portions.prompts.size)], preference, portions, watcher)
            with ruler.phase("train"):
                zeros = torch.zeros(len(batch), 4, config.prompt.height // 8, config.prompt.width // 8)
                clean = FinishedPairs(list(batch), zeros, zeros)
                pending.add(noised(clean, range(len(batch)), ("plan",), config, host), batch)
        else:
            assert preference is not None, "this method needs a preference model"
            with ruler.phase("rollout"):
                pending.add(*_rolled_out(host, config, batch, preference, portions, watcher, waiting_pairs, card))
        with ruler.phase("train"):
            update = pairs = _hardest(pending.first(per_update), config)
            if not whole:
                pairs = update.rows(torch.arange(min(portions.pairs.size, len(update))))
                if len(update) > len(pairs):
                    _fill_gradients(adapter)
            loss = configured_loss(config)
            accumulate_gradient(host, adapter, pairs, batch, config, loss, portions, scaler, taste=taste)
            optimizer_step(optimizer, scaler, adapter, watcher)
        if judges:
            optimizer.zero_grad(set_to_none=True)
            del update, pairs
            with ruler.phase("check"):
                measure(host, config, checked, 0, preference, judges, portions, watcher, None)
    precision = str(host.dtype).removeprefix("torch.")
    return MemoryPlan({name: ruler.phases[name].total_gib for name in PHASES if name in ruler.phases}, precision)


def _checked_prompts(config: Config, prompts: Sequence[str], at_a_time: int) -> list[str]:
    """Prompts of checks whose pictures are as many as are sampled or judged at a time, or all."""
    each = config.validation.validate_pictures
    return prompts_of_checks(config, prompts)[: math.ceil(max(at_a_time, JUDGED_AT_A_TIME) / each)]


def _finished(
    host: HeadlessHost,
    config: Config,
    prompts: Sequence[str],
    preference: PreferenceModel | None,
    portions: Portions,
    watcher: Watcher,
) -> None:
    """The work of method dpo before its first update: two pictures of each prompt, or those of a given pair encoded."""
    if config.preference.pairs:
        host.encode(torch.zeros(2, 3, config.prompt.height, config.prompt.width).to(host.device))
        return
    once = dataclasses.replace(config, preference=dataclasses.replace(config.preference, pairs_per_prompt=1))
    with tempfile.TemporaryDirectory() as folder:
        finished_pairs(host, once, prompts, preference, Path(folder), portions.prompts, watcher)


def _rolled_out(
    host: HeadlessHost,
    config: Config,
    batch: Sequence[str],
    preference: PreferenceModel,
    portions: Portions,
    watcher: Watcher,
    waiting_pairs: int,
    card: torch.device,
) -> tuple[Pairs, Sequence[str]]:
    """(pairs, their prompts) of a rollout, with those in front that wait for their update."""
    waiting = _waiting(waiting_pairs, config, card)
    rollout = roll_out(host, config, batch, list(range(len(batch))), preference, portions, watcher)
    assert rollout.pairs is not None  # on the imaginary card every pair is kept
    pairs = Pairs.cat([waiting, rollout.pairs]) if waiting_pairs else rollout.pairs
    del waiting, rollout
    return pairs.rows(torch.arange(len(pairs))), batch


def _in_precision_of_cpu(config: Config) -> Config:
    precision = "float32" if config.model.precision == "auto" else config.model.precision
    chosen = config.preference.preference_precision
    preference = dataclasses.replace(config.preference, preference_precision="float32" if chosen == "auto" else chosen)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, precision=precision), preference=preference
    )


def _short(config: Config) -> Config:
    """The run on a short ladder: one ordinary step, one window and its end."""
    rollout = dataclasses.replace(
        config.rollout,
        sigmas="ddim", sampling_steps=config.rollout.inner_steps + 3, divert_start_step=1, timestep_min=0,
        timestep_max=1000,
    )  # fmt: skip
    return dataclasses.replace(config, rollout=rollout)


def _transitions(config: Config) -> int:
    """Pairs of one prompt, if every verdict is kept."""
    alphas = scaled_linear_alphas_cumprod()
    windows = pool_starts(ladder_of(config, alphas), alphas, rollout_settings(config))
    return sum(end - start + 1 for start, end in windows)


def _waiting(count: int, config: Config, card: torch.device) -> Pairs:
    """Pairs of the first image, without values."""
    x_win, x_lose, next_win, next_lose = (
        torch.empty(count, 4, config.prompt.height // 8, config.prompt.width // 8, device=card) for _ in range(4)
    )
    numbers = torch.zeros(count, device=card)
    whole_numbers = torch.zeros(count, dtype=torch.int64, device=card)
    return Pairs(
        x_win, x_lose, next_win, next_lose, shared=whole_numbers.bool(), sigma=numbers, sigma_next=numbers,
        image=whole_numbers, step=whole_numbers, gap=numbers,
    )  # fmt: skip


def _hardest(pairs: Pairs, config: Config) -> Pairs:
    """The pairs, each as one whose sides start from latents of their own, where the run has such."""
    is_dpo = config.loss.method == "dpo"
    return dataclasses.replace(
        pairs, shared=torch.full((len(pairs),), config.rollout.inner_steps == 0 and not is_dpo).to(pairs.image.device)
    )


def _fill_gradients(adapter: Adapter) -> None:
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)


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
