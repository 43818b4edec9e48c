"""Out of memory: what can be done a smaller part at a time, results unchanged, is halved, and the work goes on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from spo.algorithm.preference import Candidates, PreferenceModel
from spo.errors import SpoError
from spo.training.host import Host

T = TypeVar("T")
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "cublas_status_not_initialized",  # what cuBLAS says when its workspace finds no room
    "unable to find an engine",  # what cuDNN says when no algorithm finds room for its workspace
    "unable to find a valid cudnn algorithm",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that a device, or the machine, has no memory left."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    if "cudnn_status_not_supported" in text:  # also said of sizes and layouts
        return "memory" in text
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def free_memory() -> None:
    """Give back what nobody uses any more, so that the next phase, or the next try, finds all there is."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def retry_with_less(
    work: Callable[[], T], lessen: Callable[[], str | None], say: Callable[[str], None], advice: str
) -> T:
    """`work()`, again and again with less at a time while memory runs out. `work` must be repeatable.

    lessen  halves something and says what; None: nothing is left to halve
    advice  what the user can do then

    Raises SpoError with `advice` when nothing is left; other errors pass through.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_memory()  # here, where the error no longer holds the failed call's tensors
        change = lessen()
        if change is None:
            raise SpoError(f"Out of memory, with nothing left to do a smaller part at a time; {advice}.")
        say(f"Out of memory: going on with {change}.")


def once_more() -> Callable[[], str | None]:
    """What to lessen in work that has no portions: nothing, but it is tried once more with what caches held."""
    tries = iter(["emptied caches"])
    return lambda: next(tries, None)


def loaded_scorer(load: Callable[[], T], say: Callable[[str], None]) -> T:
    """`load()`, once more with emptied caches when memory runs out. Raises SpoError when that does not help."""
    advice = "choose rest_on_cpu or preference_precision float16, a smaller preference model, or close other programs"
    return retry_with_less(load, once_more(), say, advice)


@dataclass
class Portion:
    """How much is done at a time, by the name that the user knows it by."""

    name: str
    size: int

    def halve(self) -> str | None:
        """Half as much, rounded up; says what, or None at 1."""
        if self.size <= 1:
            return None
        self.size = (self.size + 1) // 2
        return f"{self.name} {self.size}"


def in_portions(
    work: Callable[[range], T],
    count: int,
    portion: Portion,
    say: Callable[[str], None],
    advice: str,
    lessen: Callable[[], str | None] | None = None,
) -> list[T]:
    """`work(rows)` over range(count), `portion.size` rows at a time, fewer when memory runs out; its results in order.

    lessen  what to halve instead of the portion; see `retry_with_less`, also for what it raises
    """
    results: list[T] = []
    first = 0
    while first < count:

        def part(first: int = first) -> tuple[T, int]:
            rows = range(first, min(first + portion.size, count))
            return work(rows), rows.stop

        result, first = retry_with_less(part, lessen or portion.halve, say, advice)
        results.append(result)
    return results


def halve_decode_batch(host: Host) -> str | None:
    """Fewer pictures in one call of the host's VAE; says what, or None at 1."""
    if host.decode_batch <= 1:
        return None
    host.decode_batch = (host.decode_batch + 1) // 2
    return f"decode_batch {host.decode_batch}"


@dataclass
class Portions:
    """What a training run does in portions.

    prompts     sampled at a time; candidates: of each of them in one network call
    judged      prompts whose candidates are scored at a time; `Host.decode_batch`: pictures in one call of the VAE
    pairs       in one network call, in training; apart: pairs whose two sides start from latents of their own are
                evaluated one side after the other (`objective.backward_by_sides`)
    checkpointing  gradient checkpointing is on
    """

    prompts: Portion
    candidates: Portion
    judged: Portion
    pairs: Portion
    checkpointing: bool = False

    @property
    def apart(self) -> bool:
        """Once there is nothing left to halve: half the memory, for a quarter more time."""
        return self.pairs.size == 1

    def lessen_rollout(self) -> str | None:
        """Fewer prompts at a time in a rollout, then fewer candidates."""
        return self.prompts.halve() or self.candidates.halve()

    def lessen_scoring(self, host: Host) -> str | None:
        """Fewer pictures at a time through the VAE, then through the preference model."""
        return halve_decode_batch(host) or self.judged.halve()

    def lessen_training(self, host: Host) -> str | None:
        """Fewer pairs in a network call, then gradient checkpointing."""
        change = self.pairs.halve()
        if change is None and not self.checkpointing:
            self.checkpointing = True
            host.set_gradient_checkpointing(True)
            return "gradient_checkpointing on"
        return change


class ScoredInPortions:
    """A `PreferenceModel` over another, which decodes and scores fewer pictures at a time when memory runs out.

    So a verdict is repeated by itself, not the rollout before it. host: whose `decode_batch` is lowered
    """

    def __init__(self, model: PreferenceModel, host: Host, portions: Portions, say: Callable[[str], None]) -> None:
        self.model, self.host, self.portions, self.say = model, host, portions, say
        self.name, self.needs_pixels, self.needs_denoised = model.name, model.needs_pixels, model.needs_denoised

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B]; see `PreferenceModel`."""
        count = candidates.x.shape[1]

        def score(rows: range) -> Tensor:
            if len(rows) == count:
                return self.model.score(candidates, prompts)
            part = slice(rows.start, rows.stop)
            denoised = None if candidates.denoised is None else candidates.denoised[:, part]
            text = None if candidates.text is None else candidates.text[part]
            few = replace(candidates, x=candidates.x[:, part], denoised=denoised, text=text)
            return self.model.score(few, prompts[part])

        advice = "choose small_decode, a smaller preference model, or preference_precision float16"
        scores = in_portions(
            score, count, self.portions.judged, self.say, advice, lambda: self.portions.lessen_scoring(self.host)
        )
        return scores[0] if len(scores) == 1 else torch.cat(scores, 1)
