"""`sample_spo` as one of the WebUI's samplers, driven by its own KDiffusionSampler and CFG denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spo.algorithm.preference import PreferenceModel
from spo.algorithm.rollout import PoolVerdict, Rollout, RolloutSettings, sample_spo
from spo.rng import SeededDraws

NAME = "SPO"


@dataclass
class RolloutTask:
    """What the next sampling through "SPO" is to do besides making pictures; `rollout` is its result."""

    settings: RolloutSettings
    preference: PreferenceModel | None
    prompts: list[str]
    draws: SeededDraws
    decode: Callable[[Tensor], Tensor]
    watch: Callable[[PoolVerdict], None] | None
    rollout: Rollout | None = field(default=None)


_task: RolloutTask | None = None


@contextmanager
def task_for_sampler(task: RolloutTask) -> Iterator[RolloutTask]:
    """While inside, the sampler "SPO" works on `task`. One at a time: the WebUI's queue sees to that."""
    global _task
    _task = task
    try:
        yield task
    finally:
        _task = None


class HostDraws:
    """The WebUI's own noise, image by image, as its Euler a draws it; K = 1 only."""

    def noise(self, step: int, candidates: int, like: Tensor) -> Tensor:
        """[1, B, C, H, W]; see `rollout.Draws`."""
        import k_diffusion.sampling

        return k_diffusion.sampling.torch.randn_like(like)[None]

    def parents(self, step: int, candidates: int) -> Tensor:
        raise AssertionError("plain sampling chooses no parents")


def repeat_arguments(extra_args: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """The CFG denoiser's arguments for `count` candidates of every image, candidate-major, in one call of it.

    One call, so that its step counter, which prompt editing and the refiner go by, advances once a step.
    """
    from modules.prompt_parser import MulticondLearnedConditioning

    cond, image = extra_args["cond"], extra_args["image_cond"]
    return {
        **extra_args,
        "cond": MulticondLearnedConditioning((len(cond.batch) * count,), list(cond.batch) * count),
        "uncond": list(extra_args["uncond"]) * count,
        "image_cond": image.repeat(count, *[1] * (image.ndim - 1)),
    }


def sample(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
) -> Tensor:
    """A k-diffusion sampler function. Without a task: one candidate, the same picture as Euler a."""
    from modules import shared

    task = _task
    settings = task.settings if task else RolloutSettings(candidates=1, eta=eta)
    rollout = sample_spo(
        model, x, sigmas, extra_args, callback, disable,
        settings=settings,
        draws=task.draws if task else HostDraws(),
        alphas_cumprod=shared.sd_model.alphas_cumprod.cpu(),
        preference=task.preference if task else None,
        prompts=task.prompts if task else (),
        decode=task.decode if task else None,
        repeat=repeat_arguments,
        watch=task.watch if task else None,
    )  # fmt: skip
    if task:
        task.rollout = rollout
    return rollout.x


def register() -> None:
    """Make "SPO" known to the WebUI, once, also after Reload UI."""
    from modules import sd_samplers
    from modules.sd_samplers_common import SamplerData
    from modules.sd_samplers_kdiffusion import KDiffusionSampler

    made = SamplerData(NAME, lambda model: KDiffusionSampler(sample, model), ["spo"], {"uses_ensd": True})
    others = [data for data in sd_samplers.all_samplers if data.name != NAME]
    sd_samplers.all_samplers[:] = [*others, made]
    sd_samplers.all_samplers_map[NAME] = made
    sd_samplers.set_samplers()
