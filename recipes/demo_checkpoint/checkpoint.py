"""Stage "export": the networks as one Stable Diffusion 1 checkpoint, compared with diffusers' own conversion of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from recipes.demo_checkpoint.captions import CaptionedLatents
from recipes.demo_checkpoint.ldm_names import ldm_text_name, ldm_unet_name, ldm_vae_name
from recipes.demo_checkpoint.networks import (
    CLIP_LENGTH,
    SCALE_FACTOR,
    TEXT_CONFIG,
    UNET_BLOCKS,
    UNET_CHANNELS,
    UNET_HEADS,
    UNET_MULTIPLIERS,
    VaeShape,
    alphas_cumprod,
    build_text_encoder,
    encode_text,
    load_networks,
    load_vae,
    shape_of,
    tokenize,
)
from recipes.demo_checkpoint.options import Options
from recipes.demo_checkpoint.pictures import HERE, SIZE_PX, load_subjects, taught_rows


def schedule_buffers() -> dict[str, torch.Tensor]:
    """The float32 buffers that LatentDiffusion registers."""
    alpha_bar = alphas_cumprod()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    betas = 1 - alpha_bar / previous
    variance = betas * (1 - previous) / (1 - alpha_bar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar),
    }
    return {name: tensor.float() for name, tensor in buffers.items()}


def ldm_tensors(options: Options) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint: float16 weights and float32 schedule."""
    unet, text_encoder = load_networks(options.work)
    used = torch.zeros(TEXT_CONFIG["vocab_size"], dtype=torch.bool)
    used[CaptionedLatents(options, taught_rows(load_subjects(options.work))).tokens.flatten()] = True
    tensors = {f"model.diffusion_model.{ldm_unet_name(name)}": t for name, t in unet.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in ldm_vae(load_vae(options.work)).items()}
    for name, tensor in text_encoder.state_dict().items():
        unused_rows = name.endswith("token_embedding.weight")
        tensor = tensor * used[:, None] if unused_rows else tensor
        tensors[f"cond_stage_model.transformer.{ldm_text_name(name)}"] = tensor
    tensors = {name: tensor.half().contiguous() for name, tensor in tensors.items() if tensor.is_floating_point()}
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(CLIP_LENGTH)[None]
    return tensors | schedule_buffers()


def ldm_vae(vae: Any) -> dict[str, torch.Tensor]:
    """An autoencoder's tensors by LDM's names, whose attention has convolutions for matrices."""
    return {
        ldm_vae_name(name): tensor[..., None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
        for name, tensor in vae.state_dict().items()
    }


def config_yaml(vae: VaeShape) -> str:
    """The checkpoint's yaml; CLIP_DIR_HERE stands for the folder with tokenizer and text encoder config."""
    return (
        (HERE / "demo.yaml.template")
        .read_text(encoding="utf-8")
        .format(
            scale_factor=SCALE_FACTOR,
            unet_channels=UNET_CHANNELS,
            unet_blocks=UNET_BLOCKS,
            unet_heads=UNET_HEADS,
            attention_resolutions=[2**level for level in reversed(range(len(UNET_MULTIPLIERS)))],
            unet_multipliers=list(UNET_MULTIPLIERS),
            context_dim=TEXT_CONFIG["hidden_size"],
            size_px=SIZE_PX,
            vae_channels=vae.channels,
            vae_multipliers=list(vae.multipliers),
            vae_blocks=vae.blocks,
        )
    )


def write_checkpoint(options: Options, folder: Path) -> Path:
    """demo.safetensors, demo.yaml and text_encoder_config.json in `folder`, replaced in one step each."""

    folder.mkdir(parents=True, exist_ok=True)
    kind = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32"}
    (folder / "text_encoder_config.json").write_text(json.dumps(kind | TEXT_CONFIG, indent=1) + "\n")
    (folder / "demo.yaml").write_text(config_yaml(shape_of(load_vae(options.work))))
    save_file(ldm_tensors(options), folder / "demo.tmp", metadata={"format": "pt"})
    (folder / "demo.tmp").replace(folder / "demo.safetensors")
    return folder / "demo.safetensors"


def export(options: Options) -> None:
    """Write the checkpoint, then load it with diffusers' single-file loaders and compare outputs."""
    path = write_checkpoint(options, options.out)
    print(f"{path.stat().st_size / 1e6:.2f} MB")
    check_against_diffusers(options, path)


@torch.no_grad()
def check_against_diffusers(options: Options, path: Path) -> None:
    """Raise unless diffusers' own conversion of the file gives the same outputs as the networks rounded to float16."""

    unet, text_encoder = load_networks(options.work)
    vae = load_vae(options.work)
    loading = dict(original_config=str(path.with_suffix(".yaml")), torch_dtype=torch.float32)
    loaded_unet = UNet2DConditionModel.from_single_file(str(path), **loading)
    loaded_vae = AutoencoderKL.from_single_file(str(path), **loading)
    for network in (unet, text_encoder, vae):
        for parameter in network.parameters():
            parameter.copy_(parameter.half())
    loaded_text = build_text_encoder().eval()
    prefix = "cond_stage_model.transformer."
    weights = {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in load_file(path).items()
        if name.startswith(prefix) and "position_ids" not in name
    }
    own_names = {ldm_text_name(name): name for name in loaded_text.state_dict()}
    loaded_text.load_state_dict({own_names[name]: tensor for name, tensor in weights.items()})
    torch.manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    context = torch.randn(2, CLIP_LENGTH, TEXT_CONFIG["hidden_size"])
    pixels, tokens = (
        torch.rand(2, 3, SIZE_PX, SIZE_PX) * 2 - 1,
        tokenize(options.tokenizer, ["red apple", "rocket, 3d"]),
    )
    pairs = {
        "unet": (unet(x, t, context).sample, loaded_unet(x, t, context).sample),
        "decoder": (vae.decode(x).sample, loaded_vae.decode(x).sample),
        "encoder": (vae.encode(pixels).latent_dist.mean, loaded_vae.encode(pixels).latent_dist.mean),
        "text encoder": (encode_text(text_encoder, tokens), encode_text(loaded_text, tokens)),
    }
    differences = {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}
    print("largest differences from diffusers' own conversion:", differences)
    if max(differences.values()) > 1e-5:
        raise RuntimeError(f"the exported checkpoint differs from the trained networks: {differences}, accepted 1e-5")
