"""How long a run will take: one network call of each kind, timed on this card, times the plan's counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from spo.config import Config
from spo.errors import SpoError
from spo.headless.plan import Plan
from spo.lora.adapter import configured_adapter
from spo.training.memory import free_memory, is_out_of_memory
from spo.webui.host import WebUIHost, borrowed
from spo.webui.jobs import job
from spo.webui.jobs.training import Prepared
from spo.webui.seam import webui

KEPT = (1.0, 0.5)  # shares of the pairs that may turn out clear enough to be kept


@dataclass(frozen=True)
class Timing:
    """Seconds of network evaluations of one latent (one half of guidance), and of a picture decoded.

    training_s  of an evaluation in training, policy (with gradient) and reference averaged
    """

    evaluation_s: float
    training_s: float
    decode_s: float


def time_text(prepared: Prepared, plan: Plan) -> str:
    """About how long the run will take, measured now. Waits for the WebUI's queue. SpoError when memory runs out."""
    running = job.current()
    if running is not None and running.live:
        return "time        is measured when nothing else goes on"
    try:
        with webui.in_queue("SPO probe"), borrowed(prepared.config, training=True) as host:
            timing = _measure(host, prepared.prompts[0])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        free_memory()
        raise SpoError(
            "Memory runs out with a single pair: choose a smaller card under Memory, a smaller width and height under "
            "Advanced, or start the WebUI with --medvram."
        ) from None
    return estimate_text(plan, prepared.config, timing)


def estimate_text(plan: Plan, config: Config, timing: Timing) -> str:
    """One line for people."""
    shortest, longest = (seconds(plan, config, timing, kept) for kept in KEPT)
    steps = f"{timing.evaluation_s:.3g} s an evaluation, {timing.training_s:.3g} s one with gradient"
    if words(shortest) == words(longest):
        return f"time        about {words(longest)} on this machine ({steps}), without the preference model's own"
    return (
        f"time        about {words(shortest)} if all pairs are kept, {words(longest)} if half are ({steps}), "
        "without the preference model's own"
    )


def seconds(plan: Plan, config: Config, timing: Timing, kept: float) -> float:
    """Of a whole run when this share of pairs is kept. A length in updates takes as many pictures as give its pairs."""
    settings = config.optimizer
    pictures = float(plan.prompts * settings.epochs)
    if plan.steps:
        wanted = plan.steps * settings.pairs_per_update * settings.accumulation
        pictures = wanted / max(kept * plan.pairs_at_most, 1e-9)
    rollout = plan.network_evaluations * timing.evaluation_s + plan.decodes * timing.decode_s
    return pictures * (rollout + kept * plan.training_evaluations * timing.training_s)


def words(duration_s: float) -> str:
    """ "50 seconds", "12 minutes", "3.5 hours", "4 days"."""
    if duration_s < 90:
        return f"{max(duration_s, 1):.0f} seconds"
    if duration_s < 5400:
        return f"{duration_s / 60:.0f} minutes"
    return f"{duration_s / 3600:.1f} hours" if duration_s < 2 * 86400 else f"{duration_s / 86400:.0f} days"


def _measure(host: WebUIHost, prompt: str) -> Timing:
    """Each kind of call once, after one that is not timed; the adapter is taken out again."""
    config = host.config
    halves = 2 if config.loss.train_guidance and config.rollout.guidance_scale != 1 else 1
    adapter = configured_adapter(host.network, config)
    try:
        host.prepare([prompt])
        ladder = host.ladder()
        middle = len(ladder) // 2
        sigma = ladder[middle : middle + 1].to(host.device)
        x = torch.randn(1, 4, config.prompt.height // 8, config.prompt.width // 8).to(host.device) * sigma
        step = torch.tensor([middle])

        def evaluate() -> torch.Tensor:
            return host.denoise(x, sigma, [prompt], step)

        def train() -> None:
            evaluate().square().mean().backward()

        with torch.no_grad():
            evaluation_s = _seconds(evaluate, host.device)
            decode_s = _seconds(lambda: host.decode(x / (1 + sigma**2).sqrt()), host.device)
        training_s = _seconds(train, host.device)
    finally:
        adapter.remove()
    return Timing(evaluation_s / halves, (evaluation_s + training_s) / 2 / halves, decode_s)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
