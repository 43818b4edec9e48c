"""The loaded checkpoint's network, as the fork runs it: on the card by its own memory management, cast by its own
layers, and with the noise levels and the prediction type of `model_sampling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spo.webui.a1111.checkpoint import Checkpoint
from spo.webui.forked import ordinary, ordinary_weights


def denoiser(checkpoint: Checkpoint) -> Any:
    """The network for `evaluate`, on the card, with weights that autograd takes."""
    network_to_card(checkpoint)
    ordinary_weights(checkpoint.network)
    return unet_of(checkpoint.model).model


def evaluate(inner: Any, x: Tensor, sigma: Tensor, conditioning: Sequence[Any]) -> Tensor:
    """[N, C, H, W] denoised by a `denoiser` in one call; no guidance.

    x [N, C, H, W] VE; sigma [N]; conditioning: tensors [k, L, D], or SDXL's dicts of such, N rows in all, one L
    """
    x, sigma, conditioning = ordinary(x), ordinary(sigma), [ordinary(one) for one in conditioning]
    if isinstance(conditioning[0], dict):
        text = {key: torch.cat([one[key] for one in conditioning]) for key in conditioning[0]}
        return inner.apply_model(x, sigma, c_crossattn=text["crossattn"], y=text["vector"], transformer_options={})
    return inner.apply_model(x, sigma, c_crossattn=torch.cat(list(conditioning)), transformer_options={})


def unet_of(model: Any) -> Any:
    """What the fork samples with now: the UNet with the active LoRAs."""
    return model.forge_objects_after_applying_lora.unet


def compute_dtype() -> torch.dtype:
    """The precision in which the loaded network computes, whatever its weights are stored in."""
    from modules import sd_models

    unet = unet_of(sd_models.model_data.sd_model).model
    return unet.manual_cast_dtype or unet.get_dtype()


def weights_in_float8() -> bool:
    """Whether the loaded network's weights are stored in 8 bits."""
    from modules import sd_models

    return unet_of(sd_models.model_data.sd_model).model.get_dtype().itemsize == 1


def network_to_card(checkpoint: Checkpoint) -> None:
    """Bring the UNet to the card, with the active LoRAs merged, unless it is there: decoding may have sent it away."""
    from ldm_patched.modules import model_management

    unet = unet_of(checkpoint.model)
    if not any(loaded.model is unet for loaded in model_management.current_loaded_models):
        model_management.load_models_gpu([unet])
