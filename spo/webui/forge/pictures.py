"""Pictures by the WebUI's own processing, by its samplers or by ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor

from spo.webui import a1111
from spo.webui.a1111 import OwnSampling, PictureRequest, Pictures
from spo.webui.forked import ordinary, outside_inference


def txt2img(request: PictureRequest, sampling: OwnSampling | None = None) -> Pictures:
    """As `a1111.txt2img`; a sampler function of ours runs outside of inference mode, on ordinary tensors."""
    if sampling is not None:
        sampling = replace(sampling, function=_ordinary(sampling.function))
    return a1111.txt2img(request, sampling)


def _ordinary(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    @outside_inference
    def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any], **others: Any) -> Tensor:
        return function(model, ordinary(x), ordinary(sigmas), extra_args, **others)

    return sample


def repeat_arguments(extra_args: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """As `a1111.repeat_arguments`; Forge leaves the negative prompt out where the CFG scale is 1."""
    if extra_args["uncond"] is not None:
        return a1111.repeat_arguments(extra_args, count)
    return {**a1111.repeat_arguments({**extra_args, "uncond": []}, count), "uncond": None}
