"""Inside the sampler's loop, as `a1111.loop`: Forge has no callback for single predictions, and samples in inference
mode, which a model that is followed by its gradient cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from spo.webui import a1111
from spo.webui.a1111.loop import ChangeOf, Shift, Ways
from spo.webui.forge.checkpoint import alphas_cumprod, architecture
from spo.webui.forked import ordinary, outside_inference


@contextmanager
def predictions_shifted(shift: Shift) -> Iterator[None]:
    """Inside, `shift` is added to every prediction of the clean latent, before masks and previews, with or without the
    negative prompt. Guidance is an affine combination of predictions, so the guided one moves by the same. All of
    Forge's samplers, those of the DDIM kind too, predict the clean latent of a VE one.
    """
    from modules import sd_samplers_cfg_denoiser

    predict = sd_samplers_cfg_denoiser.sampling_function
    shift = outside_inference(shift)

    def shifted(denoiser: Any, denoiser_params: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        predictions = predict(denoiser, denoiser_params, *args, **kwargs)
        moved = shift(ordinary(denoiser_params.x), ordinary(denoiser_params.sigma).float())
        return tuple(one + moved.to(one) for one in predictions)

    sd_samplers_cfg_denoiser.sampling_function = shifted
    try:
        yield
    finally:
        sd_samplers_cfg_denoiser.sampling_function = predict


_WAYS = Ways(predictions_shifted, architecture, alphas_cumprod)


def script_class(
    title: str, build: Callable[[bool], tuple[list[Any], list[tuple[Any, Any]]]], change_of: ChangeOf
) -> type:
    """As `a1111.script_class`."""
    return a1111.script_class(title, build, change_of, _WAYS)
