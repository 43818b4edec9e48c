"""Inside the fork's sampler loop, which has no callback for predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from spo.webui import a1111
from spo.webui.a1111.loop import ChangeOf, LoopChange, SamplerPass, Shift, Ways
from spo.webui.forked import ordinary, outside_inference


@contextmanager
def predictions_shifted(shift: Shift) -> Iterator[None]:
    """Inside, `shift` is added to every prediction of the clean latent, before masks and previews.

    To the guided one here: it moves by as much as those of all prompts would, since guidance is an affine combination
    of them. Samplers of the DDIM kind get VE latents from the fork, too. What `shift` raises comes out of this.
    """
    shifting = outside_inference(shift)
    place, former = _place(), _place().sampling_function

    def shifted(model: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        denoised: Tensor = former(model, x, timestep, *args, **kwargs)
        return denoised + shifting(ordinary(x), ordinary(timestep).float()).to(denoised)

    place.sampling_function = shifted
    try:
        yield
    finally:
        place.sampling_function = former


def _place() -> Any:
    """The module whose `sampling_function` the CFG denoiser calls: in reForge its own, in Forge classic another."""
    from modules import sd_samplers_cfg_denoiser
    from modules_forge import forge_sampler

    return sd_samplers_cfg_denoiser if hasattr(sd_samplers_cfg_denoiser, "sampling_function") else forge_sampler


_WAYS = Ways(predictions_shifted)


def script_class(
    title: str, build: Callable[[bool], tuple[list[Any], list[tuple[Any, Any]]]], change_of: ChangeOf
) -> type:
    """As `a1111.script_class`; a sampler function of ours runs outside of `inference_mode`."""

    def change_outside(of: SamplerPass, values: Sequence[Any]) -> LoopChange | None:
        change = change_of(of, values)
        if change is None or change.function is None:
            return change
        return replace(change, function=outside_inference(change.function))

    return a1111.script_class(title, build, change_outside, _WAYS)
