"""Networks out of a demo checkpoint that is there, to go on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.demo_checkpoint.ldm_names import ldm_text_name, ldm_unet_name, ldm_vae_name
from recipes.demo_checkpoint.networks import VaeShape, build_text_encoder, build_unet, build_vae
from spo.checkpoint.shapes import vae_shape
from spo.checkpoint.tensor_file import open_tensor_file, read_tensors

VAE_PREFIX = "first_stage_model."
UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer."


def read_vae(path: Path) -> Any:
    """The autoencoder of a checkpoint in LDM's names, float32, for inference."""
    shape = vae_shape(open_tensor_file(path), VAE_PREFIX)
    multipliers = tuple(channels // shape.channels[0] for channels in shape.channels)
    vae = build_vae(VaeShape(shape.channels[0], multipliers, shape.res_blocks))
    return _filled(vae, path, lambda name: VAE_PREFIX + ldm_vae_name(name))


def read_unet(path: Path) -> Any:
    """Its UNet, float32, for inference."""
    return _filled(build_unet(), path, lambda name: UNET_PREFIX + ldm_unet_name(name))


def read_text_encoder(path: Path) -> Any:
    """Its text encoder, float32, for inference."""
    return _filled(build_text_encoder(), path, lambda name: TEXT_PREFIX + ldm_text_name(name))


def _filled(network: Any, path: Path, name_in_file: Callable[[str], str]) -> Any:
    weights = network.state_dict()
    names = {name: name_in_file(name) for name in weights}
    tensors = read_tensors(open_tensor_file(path), names.values())
    network.load_state_dict({name: tensors[theirs].float().view_as(weights[name]) for name, theirs in names.items()})
    return network.eval().requires_grad_(False)
