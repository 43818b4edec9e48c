"""The loaded checkpoint's network: evaluated as the WebUI's samplers do, with gradients where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo.webui.forge.checkpoint import Checkpoint, loaded_checkpoint, sampling_sigmas
from spo.webui.forked import ordinary_weights


@dataclass(frozen=True)
class Denoiser:
    """Forge's `KModel`, whose `apply_model` turns the network's output into the clean latent by itself.

    sigmas  [1000] the noise levels that its timesteps go by
    """

    model: Any
    sigmas: Tensor


def denoiser(checkpoint: Checkpoint) -> Denoiser:
    """The network as the samplers see it, for `evaluate`; on the card, with weights that autograd takes."""
    network_to_card(checkpoint)
    return Denoiser(checkpoint.model.forge_objects.unet.model, sampling_sigmas(checkpoint.model))


def evaluate(inner: Denoiser, x: Tensor, sigma: Tensor, conditioning: Sequence[Any]) -> Tensor:
    """[N, C, H, W] denoised by a `denoiser` in one call; no guidance.

    x [N, C, H, W] VE; sigma [N]; conditioning: tensors [k, L, D], or SDXL's dicts of such, N rows in all, one L
    """
    if isinstance(conditioning[0], dict):
        text = {key: torch.cat([one[key] for one in conditioning]) for key in conditioning[0]}
        text = {"c_crossattn": text["crossattn"], "y": text["vector"]}
    else:
        text = {"c_crossattn": torch.cat(list(conditioning))}
    with _sampled_by(inner):
        return inner.model.apply_model(x, sigma, transformer_options={}, **text)  # type: ignore[no-any-return]


@contextmanager
def _sampled_by(inner: Denoiser) -> Iterator[None]:
    """Inside, timesteps go by the noise levels that Forge sets while it samples, where it does (zero terminal SNR)."""
    predictor = inner.model.predictor
    if inner.sigmas is predictor.sigmas:
        yield
        return
    before = {name: predictor._buffers[name] for name in ("sigmas", "log_sigmas")}
    predictor.set_sigmas(inner.sigmas)
    try:
        yield
    finally:
        predictor._buffers.update(before)  # the very tensors: logarithms taken anew would differ in the last bit


def compute_dtype() -> torch.dtype:
    """The precision that the network computes in, whatever its weights are stored in."""
    return loaded_checkpoint().model.forge_objects.unet.model.computation_dtype  # type: ignore[no-any-return]


def weights_in_float8() -> bool:
    """Whether the loaded network's weights are stored in FP8 ("Diffusion in Low Bits", or the file's own)."""
    storage = loaded_checkpoint().model.forge_objects.unet.model.storage_dtype
    return isinstance(storage, torch.dtype) and storage.itemsize == 1


def network_to_card(checkpoint: Checkpoint) -> None:
    """Bring the UNet to the card, with the LoRAs merged that are active, as sampling does."""
    from backend import memory_management

    memory_management.load_models_gpu([checkpoint.model.forge_objects.unet])
    ordinary_weights(checkpoint.network)
