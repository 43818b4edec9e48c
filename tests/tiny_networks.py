"""Tiny random UNets in the layouts of SD1.5 and SDXL, built with diffusers, and what they are fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


def tiny_unet(architecture: str, seed: int = 0) -> Any:
    """SD1.5: four levels, attention on all but the coarsest; SDXL: three, on all but the finest."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    common = {"norm_num_groups": 4, "attention_head_dim": 2, "sample_size": 16, "layers_per_block": 2}
    if architecture == "sd15":
        unet = diffusers.UNet2DConditionModel(block_out_channels=(8, 8, 16, 16), cross_attention_dim=12, **common)
    else:
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2],
            cross_attention_dim=20,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 10,
            **common,
        )
    return unet.eval()


def output(unet: nn.Module, architecture: str) -> Tensor:
    """The network's output for one fixed input, [1, 4, 16, 16]."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    added = None
    if architecture == "sdxl":
        added = {"text_embeds": torch.randn(1, 10, generator=generator), "time_ids": torch.full((1, 6), 16.0)}
    text = torch.randn(1, 3, 12 if architecture == "sd15" else 20, generator=generator)
    with torch.no_grad():
        return unet(x, 321, encoder_hidden_states=text, added_cond_kwargs=added).sample


def weighted(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that can carry a LoRA, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
