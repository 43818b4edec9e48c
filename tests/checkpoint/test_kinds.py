"""What a file is, told from names and shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crafted_files import UNET, VAE, Shapes, craft, refused


def attention(context: int) -> Shapes:
    return {f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, context)}


def stem(channels: int = 4) -> Shapes:
    return {f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3)}


LABEL: Shapes = {f"{UNET}label_emb.0.0.weight": (1280, 2816)}
OPEN_CLIP_1: Shapes = {"conditioner.embedders.1.model.ln_final.weight": (1280,)}
OTHER_KINDS: dict[str, tuple[Shapes, str]] = {
    "kohya lora": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "is a LoRA"),
    "diffusers lora": ({"unet.down_blocks.1.attn1.to_q.lora_A.weight": (4, 640)}, "is a LoRA"),
    "old diffusers lora": ({"unet.mid_block.attn1.processor.to_q_lora.down.weight": (4, 640)}, "is a LoRA"),
    "loha": ({"lora_unet_x.hada_w1_a": (4, 4)}, "is a LoHa file"),
    "lokr": ({"lycoris_unet_x.lokr_w1": (4, 4)}, "is a LoKr file"),
    "embedding": ({"emb_params": (8, 768)}, "textual inversion"),
    "sdxl embedding": ({"clip_l": (8, 768), "clip_g": (8, 1280)}, "textual inversion"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "ControlNet"),
    "diffusers controlnet": ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "ControlNet"),
    "sd3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "Stable Diffusion 3"),
    "flux": ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (8, 8)}, "Flux"),
    "flux network alone": ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "Flux"),
    "other network": ({f"{UNET}blocks.0.attn.weight": (8, 8)}, "another kind of diffusion network"),
    "unet alone": ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a UNet alone"),
    "diffusers unet": ({"conv_in.weight": (3,), "down_blocks.0.resnets.0.conv1.weight": (3,)}, "a UNet alone"),
    "vae": ({"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3)}, "is a VAE"),
    "vae with prefix": ({f"{VAE}encoder.conv_in.weight": (128, 3, 3, 3)}, "is a VAE"),
    "clip": ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "text encoder alone"),
    "open clip": ({"transformer.resblocks.0.ln_1.weight": (1280,)}, "text encoder alone"),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}, "text encoder alone"),
    "upscaler": ({"conv_first.weight": (64, 3, 3, 3), "conv_body.weight": (64,)}, "is an upscaler"),
    "nothing": ({}, "is an empty file"),
    "something else": ({"a": (1,), "b": (1,), "c": (1,), "d": (1,)}, "its first tensors: a, b, c.; a text-to-image"),
    "sd2": (stem() | attention(1024), r"Stable Diffusion 2\.x checkpoint"),
    "sd2 by encoder": (stem() | {"cond_stage_model.model.ln_final.weight": (1024,)}, r"Diffusion 2\.x checkpoint"),
    "sd2 inpainting": (stem(9) | attention(1024), r"2\.x inpainting"),
    "sd2 depth": (stem(5) | attention(1024), r"2\.x depth"),
    "sd2 upscaler": (stem(7) | attention(1024), r"2\.x upscaler"),
    "sd2 unclip": (stem() | LABEL | {"embedder.model.ln_final.weight": (768,)}, r"2\.1 unCLIP"),
    "inpainting": (stem(9) | attention(768), "SD 1.x inpainting checkpoint with 9 input channels"),
    "pix2pix": (stem(8) | attention(768), "SD 1.x instruct-pix2pix checkpoint with 8 input channels"),
    "sdxl inpainting": (stem(9) | LABEL | attention(2048) | OPEN_CLIP_1, "SDXL inpainting"),
    "sdxl pix2pix": (stem(8) | LABEL | attention(2048) | OPEN_CLIP_1, "SDXL instruct-pix2pix"),
    "refiner": (stem() | LABEL | {"conditioner.embedders.0.model.ln_final.weight": (1280,)}, "SDXL refiner"),
    "refiner unet": (stem() | LABEL | attention(1280), "SDXL refiner"),
    "playground": (stem() | LABEL | attention(2048) | {"edm_mean": (4,)}, "EDM preconditioning"),
    "video": (stem(8) | LABEL | {f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight": (320,)}, "video"),
    "alt": (stem() | attention(768) | {"cond_stage_model.roberta.pooler.dense.weight": (8, 8)}, "AltDiffusion"),
    "three channels": (stem(3) | attention(768), "SD 1.x checkpoint with 3 input channels, not 4"),
    "unconditional": (stem(), "without cross-attention"),
    "cut off": (stem() | attention(768), "irregular|incomplete"),
    "flat": ({f"{UNET}input_blocks.0.0.weight": (320,)} | attention(768), r"damaged: the tensor .* shape \[320\]"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds(tmp_path: Path, kind: str) -> None:
    shapes, message = OTHER_KINDS[kind]
    refused(craft(tmp_path / "x.safetensors", shapes), message)
