"""Tiny random checkpoints with every tensor that real SD1.5 and SDXL single files have, for the whole test suite.

They are made the other way round: small diffusers and transformers networks (the sources) are built, and their weights
are written under LDM / sgm names by a map of this file's own, so loading such a file must give the sources' outputs.
No layer is zero, so outputs depend on every weight; all weights are float16 numbers, so files are written in float16
and loaded in float32 without loss. The same arguments give the same networks within a session.

    write_tiny_sd15(tmp_path / "tiny.safetensors")         7 MB, channels 32, 32, 64, 64
    write_tiny_sdxl(tmp_path / "tiny-xl.safetensors")      12 MB, channels 32, 64, 64
    tiny_sd15(), tiny_sdxl()                               their sources, to compare with
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

VOCABULARY = 49408  # the real one, so that the real tokenizer serves


@dataclass(frozen=True)
class TinySource:
    """Networks whose weights a tiny checkpoint holds; frozen, eval, float32."""

    unet: nn.Module
    vae: nn.Module
    text_encoders: tuple[nn.Module, ...]


@functools.cache
def tiny_sd15(
    seed: int = 0,
    *,
    channels: tuple[int, ...] = (32, 32, 64, 64),
    depths: tuple[int, ...] = (1, 1, 1, 0),
    res_blocks: int = 1,
    heads: int = 8,
    linear: bool = False,
    text_width: int = 32,
    text_layers: int = 3,
    text_heads: int = 1,
    text_inner: int = 2,
    deviation: float = 0.2,
    vae_channels: tuple[int, ...] = (32, 32, 32, 32),
    vae_blocks: int = 1,
) -> TinySource:
    """The source networks of `write_tiny_sd15`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = _unet(channels, depths, res_blocks, [heads] * len(channels), text_width, linear, 0)
        vae = _vae(vae_channels, vae_blocks, 0.18215)
        text = _text_encoder(text_width, text_layers, text_heads, "quick_gelu", 0, text_inner)
        return TinySource(_ready(unet, deviation), _ready(vae, deviation), (_ready(text, deviation),))


@functools.cache
def tiny_sdxl(
    seed: int = 0,
    *,
    channels: tuple[int, ...] = (32, 64, 64),
    depths: tuple[int, ...] = (0, 1, 2),
    res_blocks: int = 1,
    head_width: int = 64,
    text_widths: tuple[int, int] = (32, 32),
    text_layers: tuple[int, int] = (3, 2),
    text_heads: tuple[int, int] = (1, 1),
    text_inner: int = 2,
    projection: int = 48,
    deviation: float = 0.2,
    vae_channels: tuple[int, ...] = (32, 32, 32, 32),
    vae_blocks: int = 1,
) -> TinySource:
    """The source networks of `write_tiny_sdxl`."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        heads = [max(1, width // head_width) for width in channels]
        unet = _unet(channels, depths, res_blocks, heads, sum(text_widths), True, projection + 6 * 256)
        vae = _vae(vae_channels, vae_blocks, 0.13025)
        first = _text_encoder(text_widths[0], text_layers[0], text_heads[0], "quick_gelu", 0, text_inner)
        second = _text_encoder(text_widths[1], text_layers[1], text_heads[1], "gelu", projection, text_inner)
        texts = (_ready(first, deviation), _ready(second, deviation))
        return TinySource(_ready(unet, deviation), _ready(vae, deviation), texts)


def write_tiny_sd15(
    path: Path | str,
    seed: int = 0,
    *,
    prediction_type: str = "epsilon",
    dtype: torch.dtype = torch.float16,
    leave_out: tuple[str, ...] = (),
    **shape: object,
) -> Path:
    """A single-file checkpoint in LDM layout of the networks `tiny_sd15(seed, **shape)`.

    A path that ends in .ckpt is written as a pickle. `prediction_type` v_prediction is told by `modelspec` metadata
    (in a pickle by a yaml beside it). `leave_out`: no tensors whose names begin so, such as "first_stage_model.".
    """
    source = tiny_sd15(seed, **shape)  # type: ignore[arg-type]
    tensors = {
        **_schedule_buffers(),
        **ldm_unet_tensors(source.unet),
        **ldm_vae_tensors(source.vae),
        **clip_tensors(source.text_encoders[0], "cond_stage_model.transformer.text_model."),
    }
    return _write(Path(path), tensors, prediction_type, dtype, leave_out)


def write_tiny_sdxl(
    path: Path | str,
    seed: int = 0,
    *,
    prediction_type: str = "epsilon",
    dtype: torch.dtype = torch.float16,
    leave_out: tuple[str, ...] = (),
    **shape: object,
) -> Path:
    """A single-file checkpoint in sgm layout of the networks `tiny_sdxl(seed, **shape)`, see `write_tiny_sd15`."""
    source = tiny_sdxl(seed, **shape)  # type: ignore[arg-type]
    tensors = {
        **clip_tensors(source.text_encoders[0], "conditioner.embedders.0.transformer.text_model."),
        **open_clip_tensors(source.text_encoders[1], "conditioner.embedders.1.model."),
        **ldm_vae_tensors(source.vae),
        **ldm_unet_tensors(source.unet),
    }
    return _write(Path(path), tensors, prediction_type, dtype, leave_out)


def write_vae(path: Path | str, source: TinySource, *, prefix: str = "") -> Path:
    """The source's VAE alone, in an LDM file: .safetensors, or a pickle by any other ending."""
    tensors = {prefix + name.removeprefix("first_stage_model."): t for name, t in ldm_vae_tensors(source.vae).items()}
    return _write(Path(path), tensors, "epsilon", torch.float32, ())


def write_diffusers_folder(path: Path | str, source: TinySource) -> Path:
    """The source networks as a diffusers folder, with everything a pipeline wants."""
    import json
    import shutil

    path = Path(path)
    is_xl = len(source.text_encoders) == 2
    source.unet.save_pretrained(path / "unet")
    source.vae.save_pretrained(path / "vae")
    for name, encoder in zip(("text_encoder", "text_encoder_2"), source.text_encoders, strict=False):
        encoder.save_pretrained(path / name)
        shutil.copytree(tokenizer_folder(), path / name.replace("text_encoder", "tokenizer"), dirs_exist_ok=True)
    (path / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                 "beta_end": 0.012, "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False,
                 "steps_offset": 1, "prediction_type": "epsilon"}  # fmt: skip
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index: dict[str, object] = {
        "_class_name": "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if is_xl:
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                  "tokenizer_2": ["transformers", "CLIPTokenizer"]}  # fmt: skip
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def tokenizer_folder() -> Path:
    """CLIP's tokenizer as the package ships it."""
    return Path(__file__).resolve().parents[1] / "spo" / "clip_tokenizer"


# ---------------------------------------------------------------------------------------------- the networks


def _unet(
    channels: tuple[int, ...],
    depths: tuple[int, ...],
    res_blocks: int,
    heads: list[int],
    context_width: int,
    linear: bool,
    added_width: int,
) -> nn.Module:
    from diffusers import UNet2DConditionModel

    added = {}
    if added_width:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                 "projection_class_embeddings_input_dim": added_width}  # fmt: skip
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=channels,
        layers_per_block=res_blocks,
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        transformer_layers_per_block=[depth or 1 for depth in depths],
        attention_head_dim=heads,
        cross_attention_dim=context_width,
        use_linear_projection=linear,
        **added,
    )


def _vae(channels: tuple[int, ...], blocks: int, scale_factor: float) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        scaling_factor=scale_factor,
    )


def _text_encoder(width: int, layers: int, heads: int, activation: str, projection: int, inner: int = 2) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=projection or width,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


@torch.no_grad()
def _ready(network: nn.Module, deviation: float) -> nn.Module:
    """Frozen, eval, and away from zeros and ones in norms and biases; small weights brought to this deviation."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.05 * torch.randn_like(parameter))
        elif parameter.std() < deviation / 4:  # transformers' initial weights hardly let a prompt through
            parameter.mul_(deviation / parameter.std())
        parameter.copy_(parameter.half().float())
    return network.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------- their LDM names


def ldm_unet_name(name: str, res_blocks: int, attending_up: tuple[bool, ...]) -> str:
    """The LDM name, without `model.diffusion_model.`, of a diffusers UNet's tensor.

    attending_up  whether up_blocks.0, 1, ... have attention: there the upsampler is the third module, else the second
    """
    per_level = res_blocks + 1
    outer = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
    module, leaf = name.rsplit(".", 1)
    if module in outer:
        return f"{outer[module]}.{leaf}"
    found = re.match(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
    assert found, name
    side, level_text, kind, index_text, rest = found.groups()
    level, index = int(level_text or 0), int(index_text)
    if kind == "resnets":
        inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
                 "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
        layer, leaf = rest.split(".")
        rest = f"{inner[layer]}.{leaf}"
    place = {"resnets": 0, "attentions": 1}.get(kind, 0)
    if side == "mid_block":
        return f"middle_block.{2 * index + place}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{per_level * (level + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{per_level * level + res_blocks}.{2 if attending_up[level] else 1}.{rest}"
    if side == "down_blocks":
        return f"input_blocks.{1 + per_level * level + index}.{place}.{rest}"
    return f"output_blocks.{per_level * level + index}.{place}.{rest}"


def ldm_unet_tensors(unet: nn.Module) -> dict[str, Tensor]:
    """The UNet's tensors under `model.diffusion_model.` names."""
    attending = tuple("CrossAttn" in kind for kind in unet.config.up_block_types)
    return {
        "model.diffusion_model." + ldm_unet_name(name, unet.config.layers_per_block, attending): tensor
        for name, tensor in unet.state_dict().items()
    }


def ldm_vae_tensors(vae: nn.Module) -> dict[str, Tensor]:
    """The VAE's tensors under `first_stage_model.` names; attention weights as 1 x 1 convolutions."""
    levels = len(vae.config.block_out_channels)
    pairs = [
        (r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2."),
        (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}."),
        (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"group_norm", "norm"),
        (r"\.to_(q|k|v)\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
    ]
    tensors = {}
    for name, tensor in vae.state_dict().items():
        is_projection = ".attentions." in name and name.endswith(".weight") and "norm" not in name
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        tensors["first_stage_model." + name] = tensor[:, :, None, None] if is_projection else tensor
    return tensors


def clip_tensors(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A transformers CLIP text encoder's tensors under prefix + "embeddings..." and so on."""
    tensors = {prefix + name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    return {**tensors, prefix + "embeddings.position_ids": torch.arange(77)[None]}


def open_clip_tensors(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The same encoder under open_clip's names: one fused q, k, v matrix, and the projection transposed."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    tensors = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6052),
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for layer in range(encoder.config.num_hidden_layers):
        old, new = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for leaf in ("weight", "bias"):
            fused = [state[f"{old}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            tensors[f"{new}attn.in_proj_{leaf}"] = torch.cat(fused)
            tensors |= {f"{new}{there}.{leaf}": state[f"{old}{here}.{leaf}"] for here, there in inner.items()}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _schedule_buffers() -> dict[str, Tensor]:
    """The buffers that LDM saves with SD1.x."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    alphas = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    variance = betas * (1 - before) / (1 - alphas)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - alphas),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - alphas),
    }
    return {name: value.float() for name, value in buffers.items()}


def _write(
    path: Path, tensors: dict[str, Tensor], prediction_type: str, dtype: torch.dtype, leave_out: tuple[str, ...]
) -> Path:
    from safetensors.torch import save_file

    kept = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
        if not name.startswith(leave_out or ("-",))
    }
    if path.suffix == ".safetensors":
        metadata = {"modelspec.prediction_type": "v"} if prediction_type == "v_prediction" else {}
        save_file(kept, str(path), metadata={"format": "pt", **metadata})
        return path
    torch.save({"state_dict": kept, "global_step": 1}, str(path))
    if prediction_type == "v_prediction":
        path.with_suffix(".yaml").write_text("model:\n  params:\n    parameterization: v\n")
    return path
