"""The user's VAE, as the fork runs it: latents to pictures and back."""

from __future__ import annotations

import torch
from torch import Tensor

from spo.errors import SpoError
from spo.webui.a1111.checkpoint import Checkpoint
from spo.webui.a1111.vae import are_pictures, bad_vae_text
from spo.webui.forked import outside_inference


@outside_inference
def decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """[N, 4, h, w] latents -> [N, 3, 8 h, 8 w] float32, about [-1, 1], by the user's VAE and decode method.

    SpoError, naming the VAE, when the pictures are NaN or black; the fork chooses the VAE's precision at its start.
    """
    from modules import sd_samplers_common

    pictures = sd_samplers_common.decode_first_stage(checkpoint.model, latents).float().clone()
    if not are_pictures(pictures):
        raise SpoError(bad_vae_text("gave pictures that are not finite or all black"))
    return pictures


@outside_inference
def encode(checkpoint: Checkpoint, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
    """[N, 3, H, W] pictures in [-1, 1] -> [N, 4, H / 8, W / 8] float32 latents by the user's VAE.

    noise  [N, 4, H / 8, W / 8] draws from the encoding; None: its mean. The fork's own encoding draws by itself
    Raises SpoError, naming the VAE, when they are not finite.
    """
    from ldm_patched.modules import model_management

    objects = checkpoint.model.forge_objects
    vae = objects.vae
    model_management.load_models_gpu([vae.patcher])
    stage = vae.first_stage_model
    moments = stage.quant_conv(stage.encoder(pictures.to(vae.device, vae.vae_dtype))).float()
    mean, log_variance = moments.chunk(2, dim=1)
    if noise is not None:
        mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise.to(mean)
    latents = objects.unet.model.model_config.latent_format.process_in(mean).to(pictures.device).float()
    if not bool(torch.isfinite(latents).all()):
        raise SpoError(bad_vae_text("gave latents that are not finite"))
    return latents
