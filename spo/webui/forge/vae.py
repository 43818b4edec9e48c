"""The user's VAE: latents to pictures and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.errors import SpoError
from spo.webui.a1111.options import option
from spo.webui.a1111.vae import are_pictures
from spo.webui.forge.checkpoint import Checkpoint
from spo.webui.forge.network import network_to_card
from spo.webui.forked import ordinary


@torch.no_grad()
def decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """[N, 4, h, w] latents -> [N, 3, 8 h, 8 w] float32, about [-1, 1], by the user's VAE and decode method.

    SpoError, naming the VAE, when the pictures are NaN or black. Where Forge made room on the card for the VAE, the
    network is brought back afterwards.
    """
    from modules import sd_samplers_common

    pictures: Tensor = ordinary(sd_samplers_common.decode_first_stage(checkpoint.model, latents)).float()
    network_to_card(checkpoint)
    if not are_pictures(pictures):
        raise SpoError(bad_vae_text("gave pictures that are not finite or all black"))
    return pictures


def bad_vae_text(what: str) -> str:
    """A sentence about the VAE in use, which `what`, and what to do."""
    modules = [Path(file).name for file in option("forge_additional_modules") or []]
    name = ", ".join(modules) or "the checkpoint's own"
    return (
        f"The VAE ({name}) {what}; choose another VAE, or start the WebUI with --vae-in-fp32. Nothing was scored or "
        "voted on by them."
    )


@torch.no_grad()
def encode(checkpoint: Checkpoint, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
    """[N, 3, H, W] pictures in [-1, 1] -> [N, 4, H / 8, W / 8] float32 latents by the user's VAE.

    noise  [N, 4, H / 8, W / 8] draws from the encoding; None: its mean
    Raises SpoError, naming the VAE, when they are not finite.
    """
    vae = checkpoint.model.forge_objects.vae.clone()
    moments: list[Any] = []  # of one picture after another, as Forge may take fewer at a time

    def remember(posterior: Any) -> Tensor:
        moments.append(posterior)
        return posterior.mean  # type: ignore[no-any-return]

    vae.patcher.set_model_vae_regulation(remember)
    vae.encode(pictures.movedim(1, -1) * 0.5 + 0.5)
    latents = torch.cat([posterior.mean for posterior in moments])
    if noise is not None:
        latents = latents + torch.cat([posterior.std for posterior in moments]) * noise.to(latents)
    latents = vae.first_stage_model.process_in(latents).float()
    network_to_card(checkpoint)
    if not bool(torch.isfinite(latents).all()):
        raise SpoError(bad_vae_text("gave latents that are not finite"))
    return ordinary(latents)  # type: ignore[no-any-return]
