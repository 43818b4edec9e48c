"""The user's VAE: latents to pictures and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spo.errors import SpoError
from spo.webui.a1111.checkpoint import Checkpoint
from spo.webui.a1111.options import option


@torch.no_grad()
def decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """[N, 4, h, w] latents -> [N, 3, 8 h, 8 w] float32, about [-1, 1], by the user's VAE and decode method.

    A half-precision VAE that overflows is switched to the precision that the WebUI's settings name, as the WebUI does
    (processing.decode_latent_batch), for good. SpoError, naming the VAE, when the pictures are NaN or black even so.
    """
    from modules import devices, sd_samplers_common

    with _without_casting_by_hand():
        pictures = sd_samplers_common.decode_first_stage(checkpoint.model, latents).float()
        better = _better_vae_dtype()
        if not are_pictures(pictures) and better not in (None, devices.dtype_vae):
            devices.dtype_vae = better
            checkpoint.model.first_stage_model.to(better)
            pictures = sd_samplers_common.decode_first_stage(checkpoint.model, latents).float()
    if not are_pictures(pictures):
        raise SpoError(bad_vae_text("gave pictures that are not finite or all black"))
    return pictures


def are_pictures(pictures: Tensor) -> bool:
    """Whether all of [N, 3, H, W] are finite, and none is nothing but black."""
    return bool(torch.isfinite(pictures).all()) and bool((pictures.flatten(1).amax(1) > -1).all())


def _better_vae_dtype() -> torch.dtype | None:
    """What the settings say that a VAE is to be switched to when it gives NaN."""
    if option("auto_vae_precision_bfloat16"):
        return torch.bfloat16
    return torch.float32 if option("auto_vae_precision") else None


def bad_vae_text(what: str) -> str:
    """A sentence about the VAE in use, which `what`, and what to do."""
    from modules import sd_vae

    name = sd_vae.get_loaded_vae_name() or "the checkpoint's own"
    return (
        f"The VAE ({name}) {what}; choose another SD VAE, or start the WebUI with --no-half-vae. Nothing was scored or "
        "voted on by them."
    )


@torch.no_grad()
def encode(checkpoint: Checkpoint, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
    """[N, 3, H, W] pictures in [-1, 1] -> [N, 4, H / 8, W / 8] float32 latents by the user's VAE.

    noise  [N, 4, H / 8, W / 8] draws from the encoding; None: its mean. SDXL's stage draws by itself
    Raises SpoError, naming the VAE, when they are not finite.
    """
    from modules import devices

    model = checkpoint.model
    with devices.without_autocast(), _without_casting_by_hand():
        encoded = model.encode_first_stage(pictures.to(next(model.first_stage_model.parameters()).dtype))
        if isinstance(encoded, Tensor):
            latents = model.get_first_stage_encoding(encoded).float()
        else:
            drawn = encoded.mode() if noise is None else encoded.mean + encoded.std * noise.to(encoded.mean)
            latents = (model.scale_factor * drawn).float()
    if not bool(torch.isfinite(latents).all()):
        raise SpoError(bad_vae_text("gave latents that are not finite"))
    return latents


@contextmanager
def _without_casting_by_hand() -> Iterator[None]:
    """The VAE in its own precision, also inside the WebUI's `manual_cast`, outside which the WebUI itself decodes."""
    from modules import devices

    casting = [(kind, kind.forward) for kind in devices.patch_module_list if hasattr(kind, "org_forward")]
    for kind, _ in casting:
        kind.forward = kind.org_forward
    try:
        yield
    finally:
        for kind, forward in casting:
            kind.forward = forward
