"""Pictures by the fork's own processing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spo.webui.a1111 import pictures
from spo.webui.a1111.pictures import OwnSampling, PictureRequest, Pictures
from spo.webui.forked import ordinary, outside_inference

# what the training step does not have, and reForge takes from the settings alone
_OFF = {"s_min_uncond": 0.0, "skip_early_cond": 0.0, "epsilon_scaling_enabled": False}


def txt2img(request: PictureRequest, sampling: OwnSampling | None = None) -> Pictures:
    """As `a1111.txt2img`; the fork samples under `inference_mode`, out of which our own sampler function is taken."""
    if sampling is None:
        made = pictures.txt2img(request, prepare=_without_scripts)
    else:
        own = replace(sampling, function=outside_inference(sampling.function))
        made = pictures.txt2img(request, own, prepare=_without_scripts, settings=_known(_OFF))
    return replace(made, latents=ordinary(made.latents))


def _without_scripts(p: Any) -> None:
    """reForge looks for a script among those of p, and p without a runner of scripts has none to look among."""
    from modules import scripts

    p.scripts, p.script_args = scripts.ScriptRunner(), []


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    from modules import shared

    return {name: value for name, value in settings.items() if name in shared.opts.data}
