"""The networks of the demo checkpoint, and its noise schedule."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipes.demo_checkpoint.pictures import SIZE_PX
from spo.files import write_whole

SCALE_FACTOR = 0.18215
CLIP_LENGTH = 77
VAE_LEVELS = 4  # 8 x 8 latents of 64-pixel pictures: three halvings
UNET_CHANNELS, UNET_MULTIPLIERS, UNET_BLOCKS, UNET_HEADS = 64, (1, 2), 2, 4


@dataclass(frozen=True)
class VaeShape:
    """channels: of the first level, multiplied on each; blocks: of the encoder's levels, the decoder has one more."""

    channels: int
    multipliers: tuple[int, ...]
    blocks: int


# LDM's GroupNorm has 32 groups: with 32 channels each sees one, whose strength in a picture it takes away
VAE = VaeShape(64, (1, 1, 1, 1), 2)
SHIPPED_VAE = VaeShape(64, (1, 1, 1, 1), 1)  # of spo/demo/demo.safetensors, see new_autoencoder

TEXT_CONFIG: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=256,
    num_attention_heads=4,
    num_hidden_layers=4,
    projection_dim=64,
    max_position_embeddings=CLIP_LENGTH,
    vocab_size=49408,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)


def build_vae(shape: VaeShape = VAE) -> Any:
    """An untrained AutoencoderKL: three halvings, so 8 x 8 latents of 64-pixel pictures."""
    levels = len(shape.multipliers)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[shape.channels * m for m in shape.multipliers],
        layers_per_block=shape.blocks,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=SIZE_PX,
        scaling_factor=SCALE_FACTOR,
    )


def shape_of(vae: Any) -> VaeShape:
    """What `build_vae` was given."""
    width, *others = vae.config.block_out_channels
    return VaeShape(width, (1, *(other // width for other in others)), vae.config.layers_per_block)


def save_vae(vae: Any, path: Path) -> None:
    """Its weights, and the shape that they fit."""
    kept = {"shape": astuple(shape_of(vae)), "weights": vae.state_dict()}
    write_whole(path, lambda temporary: torch.save(kept, temporary))


def load_vae(work: Path, name: str = "vae_folded.pt") -> Any:
    """The autoencoder, for inference: with SCALE_FACTOR's convention folded in; "vae.pt": as it was trained."""
    kept = torch.load(work / name)
    vae = build_vae(VaeShape(*kept["shape"]))
    vae.load_state_dict(kept["weights"])
    return vae.eval().requires_grad_(False)


def build_unet() -> Any:
    """An untrained UNet2DConditionModel of two levels, both with attention to the text."""
    levels = len(UNET_MULTIPLIERS)
    return UNet2DConditionModel(
        sample_size=SIZE_PX // 8,
        block_out_channels=[UNET_CHANNELS * m for m in UNET_MULTIPLIERS],
        down_block_types=["CrossAttnDownBlock2D"] * levels,
        up_block_types=["CrossAttnUpBlock2D"] * levels,
        layers_per_block=UNET_BLOCKS,
        cross_attention_dim=TEXT_CONFIG["hidden_size"],
        attention_head_dim=UNET_HEADS,
    )


def build_text_encoder() -> Any:
    """An untrained CLIPTextModel with CLIP's vocabulary."""
    return CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))


def tokenize(tokenizer_folder: Path, texts: list[str]) -> torch.Tensor:
    """CLIP token ids, int64 [N, 77], padded with the end token."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    batch = tokenizer(texts, padding="max_length", max_length=CLIP_LENGTH, truncation=True, return_tensors="pt")
    return batch.input_ids


def encode_text(text_encoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Last hidden state after the final layer norm, [N, 77, 64]."""
    return text_encoder(input_ids=tokens).last_hidden_state


def load_networks(work: Path, name: str = "unet.pt") -> tuple[Any, Any]:
    """UNet and text encoder with the averaged weights, for inference. name: "unet_all.pt" for those before the core."""
    networks = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder()})
    networks.load_state_dict(torch.load(work / name))
    networks.eval().requires_grad_(False)
    return networks["unet"], networks["text_encoder"]


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's schedule, float64 [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def parameter_count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
