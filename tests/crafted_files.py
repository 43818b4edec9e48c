"""Checkpoint files for tests: real headers over holes, full-size ones included."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from spo.checkpoint.inspect import inspect_checkpoint
from spo.checkpoint.tensor_file import open_tensor_file
from spo.errors import SpoError
from tests.tiny_checkpoints import (
    clip_tensors,
    ldm_unet_tensors,
    ldm_vae_tensors,
    open_clip_tensors,
)

HERE = Path(__file__).parent
UNET = "model.diffusion_model."
VAE = "first_stage_model."
BYTES = {"F32": 4, "F16": 2, "I64": 8, "BF16": 2}
Shapes = dict[str, tuple[int, ...]]


def craft(path: Path, shapes: Shapes, *, dtype: str = "F16", metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of zeros: a real header, and a hole of the right size after it."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count * BYTES[dtype]]}
        end += count * BYTES[dtype]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


def shapes_of(path: Path) -> Shapes:
    return {name: entry.shape for name, entry in open_tensor_file(path).tensors.items()}


def full_size_shapes(architecture: str) -> Shapes:
    """Every tensor of a full single file; networks on the meta device take no memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    narrow = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    wide = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    xl_unet = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(xl_unet if architecture == "sdxl" else {"cross_attention_dim": 768}))
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        first = CLIPTextModel(CLIPTextConfig(**narrow))
        tensors = {**ldm_unet_tensors(unet), **ldm_vae_tensors(vae)}
        if architecture == "sdxl":
            second = CLIPTextModelWithProjection(CLIPTextConfig(**wide, projection_dim=1280))
            tensors |= clip_tensors(first, "conditioner.embedders.0.transformer.text_model.")
            tensors |= open_clip_tensors(second, "conditioner.embedders.1.model.")
        else:
            tensors |= clip_tensors(first, "cond_stage_model.transformer.text_model.")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if "position_ids" not in name}


def refused(path: Path, message: str) -> None:
    with pytest.raises(SpoError) as caught:
        inspect_checkpoint(path)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


ONE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))
