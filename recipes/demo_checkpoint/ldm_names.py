"""Names of tensors as in Stable Diffusion 1 checkpoints."""

from __future__ import annotations

import re

from recipes.demo_checkpoint.networks import UNET_BLOCKS, VAE_LEVELS

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION_NAMES = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_unet_name(name: str) -> str:
    """A tensor's name in LDM's UNetModel, from its name in diffusers' UNet2DConditionModel."""
    period = UNET_BLOCKS + 1
    for old, new in (
        ("conv_in.", "input_blocks.0.0."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("mid_block.attentions.0.", "middle_block.1."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    side, rest = name.split(".", 1)
    if side == "mid_block":
        _, index, rest = rest.split(".", 2)
        return f"middle_block.{2 * int(index)}.{renamed(rest, RESNET_NAMES)}"
    block, kind, index, rest = rest.split(".", 3)
    stage, first = ("input_blocks", 1) if side == "down_blocks" else ("output_blocks", 0)
    position = first + int(block) * period + int(index)
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * period}.0.{rest.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        return f"output_blocks.{int(block) * period + UNET_BLOCKS}.2.{rest}"
    if kind == "attentions":
        return f"{stage}.{position}.1.{rest}"
    return f"{stage}.{position}.0.{renamed(rest, RESNET_NAMES)}"


def renamed(name: str, table: dict[str, str]) -> str:
    stem, leaf = name.rsplit(".", 1)
    return f"{table.get(stem, stem)}.{leaf}"


def ldm_vae_name(name: str) -> str:
    """A tensor's name in LDM's AutoencoderKL, from its name in diffusers' AutoencoderKL."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(
        r"mid_block\.attentions\.0\.(.+)\.(\w+)$", lambda m: f"mid.attn_1.{ATTENTION_NAMES[m[1]]}.{m[2]}", name
    )
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    level = VAE_LEVELS - 1
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{level - int(m[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{level - int(m[1])}.upsample.", name)


def ldm_text_name(name: str) -> str:
    """A tensor's name below cond_stage_model.transformer; transformers 5 leaves out the first part."""
    return name if name.startswith("text_model.") else f"text_model.{name}"
