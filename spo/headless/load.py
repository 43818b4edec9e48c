"""A checkpoint's networks are loaded through diffusers and transformers, offline.

Every configuration is derived from `inspect_checkpoint`, so no hub and no shipped configuration is needed, and small
checkpoints load like full ones.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo.checkpoint.folder import FolderPart, open_folder_part
from spo.checkpoint.info import CheckpointInfo
from spo.checkpoint.inspect import inspect_checkpoint
from spo.checkpoint.kinds import OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from spo.checkpoint.shapes import TextEncoderShape, UNetShape, VaeShape, clip_prefix, vae_shape
from spo.checkpoint.tensor_file import TensorFile, open_tensor_file, read_tensors
from spo.checkpoint.webui_yaml import NoiseSchedule
from spo.errors import SpoError
from spo.headless.model import DiffusersModel

TRAINING_TIMESTEPS = 1000
_LAST_ALPHA_CUMPROD = 4.8973451890853435e-08  # instead of an exact 0, as the WebUI does: sigma stays finite


def load_model(
    path: Path | str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    vae_path: Path | str | None = None,
    prediction_type: str | None = None,
    config_path: Path | str | None = None,
    vae_dtype: torch.dtype | None = None,
) -> DiffusersModel:
    """The checkpoint at `path` (see `inspect_checkpoint`, also for the last two), frozen and in eval mode.

    dtype      of the UNet, the text encoders and the text features
    vae_path   a VAE instead of the checkpoint's: an LDM file (.safetensors, .pt, .ckpt; `first_stage_model.` before its
               names or not; a whole checkpoint too), or a diffusers folder
    vae_dtype  default: float32, or `dtype` if the VAE was made for half precision (a file or folder with "fp16" and
               "fix" in its name, or `force_upcast: false` in its configuration)

    Raises SpoError when something is missing, is of another kind, or does not fit.
    """
    info = inspect_checkpoint(path, config_path=config_path, prediction_type=prediction_type)
    if not info.text_encoders:
        raise SpoError(f'"{info.path.name}" holds no text encoder, so prompts cannot be encoded; use a full checkpoint')
    if info.vae is None and vae_path is None:
        raise SpoError(f'"{info.path.name}" holds no VAE: give one, a file or a diffusers folder')
    device = torch.device(device)
    file = None if info.is_folder else open_tensor_file(info.path)
    alphas_cumprod = _alphas_cumprod(info, file)
    numbers = range(len(info.text_encoders))
    return DiffusersModel(
        info=info,
        unet=_load_unet(info, file, device, dtype),
        vae=_load_vae(info, file, None if vae_path is None else Path(vae_path), device, dtype, vae_dtype),
        text_encoders=[_load_text_encoder(info, file, number, device, dtype) for number in numbers],
        alphas_cumprod=alphas_cumprod,
        device=device,
        dtype=dtype,
    )


def _alphas_cumprod(info: CheckpointInfo, file: TensorFile | None) -> Tensor:
    alphas = _schedule_alphas_cumprod(info.schedule)
    if file is not None and "alphas_cumprod" in file.tensors:
        stored = read_tensors(file, ["alphas_cumprod"])["alphas_cumprod"]
        if stored.shape != (TRAINING_TIMESTEPS,):
            raise SpoError(f'"{info.path.name}" has a schedule of the shape {list(stored.shape)}, not 1000 timesteps')
        was_rounded = stored.element_size() < 4 and torch.allclose(stored.float(), alphas.float(), rtol=0, atol=4e-3)
        alphas = alphas if was_rounded else stored.double()
    if info.zero_terminal_snr and info.prediction_type == "v_prediction" and alphas[-1] > 1e-6:
        # Lin et al. 2023, algorithm 1: shift the last square root to 0, scale the first back
        roots = alphas.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
    return alphas.clamp(min=_LAST_ALPHA_CUMPROD).float()


def _schedule_alphas_cumprod(schedule: NoiseSchedule) -> Tensor:
    start, end, count = schedule.beta_start, schedule.beta_end, TRAINING_TIMESTEPS
    if schedule.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    elif schedule.beta_schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    else:
        raise SpoError(f'the beta schedule "{schedule.beta_schedule}" is not known (accepted: scaled_linear, linear)')
    return (1.0 - betas).cumprod(0)


def empty_unet(info: CheckpointInfo) -> Any:
    """The checkpoint's UNet (diffusers' UNet2DConditionModel) on the meta device, no weights: to count and weigh."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        if info.is_folder:
            return UNet2DConditionModel.from_config(_public(open_folder_part(info.path / "unet")))
        return UNet2DConditionModel(**_unet_config(info.unet))


def _load_unet(info: CheckpointInfo, file: TensorFile | None, device: torch.device, dtype: torch.dtype) -> Any:
    unet = empty_unet(info)
    if file is None:
        tensors = _folder_tensors(open_folder_part(info.path / "unet"))
        return _fill(unet, tensors, device, dtype, f"UNet in {info.path.name}")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    tensors = read_tensors(file, [name for name in file.tensors if name.startswith(UNET_PREFIX)])
    converted = convert_ldm_unet_checkpoint(tensors, dict(unet.config))
    unused = len(tensors) - len(unet.state_dict().keys() & converted.keys())
    if unused:
        warnings.warn(f"{info.path.name}: {unused} tensors of its UNet have no known use, left out", stacklevel=3)
    tensors.clear()  # `converted` alone holds them now, and `_fill` lets go of one after the other
    return _fill(unet, converted, device, dtype, f"UNet in {info.path.name}")


def _unet_config(shape: UNetShape) -> dict[str, Any]:
    depths = [depth or 1 for depth in shape.depths[:-1]] + [shape.middle_depth]  # diffusers: the middle has the last's
    config: dict[str, Any] = {
        "sample_size": 128 if shape.added_width else 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": shape.channels,
        "layers_per_block": shape.res_blocks,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in shape.depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(shape.depths)),
        "transformer_layers_per_block": depths,
        "attention_head_dim": list(shape.heads),  # diffusers' name for the number of heads
        "cross_attention_dim": shape.context_width,
        "use_linear_projection": shape.linear_projection,
    }
    if shape.added_width:
        size_width = 256  # of each of the six embedded sizes; the rest is pooled text
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": size_width,
            "projection_class_embeddings_input_dim": shape.added_width,
        }
    return config


def _load_vae(
    info: CheckpointInfo,
    file: TensorFile | None,
    override: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None,
) -> Any:
    vae, tensors, is_half_safe = _vae_and_tensors(info, file, override)
    vae_dtype = vae_dtype or (dtype if is_half_safe else torch.float32)
    return _fill(vae, tensors, device, vae_dtype, f"VAE in {(override or info.path).name}")


def _vae_and_tensors(
    info: CheckpointInfo, file: TensorFile | None, override: Path | None
) -> tuple[Any, dict[str, Tensor], bool]:
    """The VAE without weights, its tensors, and whether it was made for half precision."""
    if override is None:
        if file is None or info.vae is None:
            return _vae_in_folder(info.path / "vae", info.scale_factor)
        return *_vae_in_file(file, VAE_PREFIX, info.vae, info.scale_factor), False
    is_half_safe = "fp16" in override.name.lower() and "fix" in override.name.lower()
    if override.is_dir():
        inner = override / "vae" if (override / "vae").is_dir() else override
        vae, tensors, says_so = _vae_in_folder(inner, info.scale_factor)
        return vae, tensors, says_so or is_half_safe
    file = open_tensor_file(override)
    for prefix in (VAE_PREFIX, ""):
        if f"{prefix}decoder.conv_in.weight" in file.tensors and f"{prefix}encoder.conv_in.weight" in file.tensors:
            if any(entry.startswith(f"{prefix}decoder.up_blocks.") for entry in file.tensors):
                raise SpoError(f'"{override.name}" has diffusers names: give the folder that holds its config.json')
            return *_vae_in_file(file, prefix, vae_shape(file, prefix), info.scale_factor), is_half_safe
    raise SpoError(f'"{override.name}" is not a VAE: it holds no encoder and decoder')


def _vae_in_file(file: TensorFile, prefix: str, shape: VaeShape, scale_factor: float) -> tuple[Any, dict[str, Tensor]]:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = len(shape.channels)
    with torch.device("meta"):
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=shape.channels,
            layers_per_block=shape.res_blocks,
            latent_channels=shape.latent_channels,
            sample_size=512,
            scaling_factor=scale_factor,
        )
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    names = [name for name in file.tensors if name.startswith(tuple(prefix + part for part in parts))]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(file, names).items()}
    return vae, convert_ldm_vae_checkpoint(tensors, dict(vae.config))


def _vae_in_folder(folder: Path, scale_factor: float) -> tuple[Any, dict[str, Tensor], bool]:
    from diffusers import AutoencoderKL

    part = open_folder_part(folder)
    kind = part.config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL" or part.config.get("latent_channels", 4) != 4:
        raise SpoError(f'"{folder}" holds a {kind}, not a Stable Diffusion VAE (AutoencoderKL, 4 latent channels)')
    with torch.device("meta"):
        vae = AutoencoderKL.from_config({**_public(part), "scaling_factor": scale_factor})
    old_names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    tensors = {}
    for name, tensor in _folder_tensors(part).items():
        *before, layer, leaf = name.split(".")
        tensors[".".join([*before, old_names.get(layer, layer), leaf])] = tensor
    return vae, tensors, part.config.get("force_upcast") is False


def _load_text_encoder(
    info: CheckpointInfo, file: TensorFile | None, number: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = info.text_encoders[number]
    with torch.device("meta"):
        config = CLIPTextConfig(**_text_config(shape))
        encoder = CLIPTextModelWithProjection(config) if shape.projection else CLIPTextModel(config)
    if file is None:
        folder = info.path / ("text_encoder" if number == 0 else "text_encoder_2")
        tensors = _folder_tensors(open_folder_part(folder))
    elif shape.kind == "clip":
        prefix = clip_prefix(file, info.architecture)
        names = [name for name in file.tensors if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(file, names).items()}
    else:
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        names = [name for name in file.tensors if name.startswith(OPEN_CLIP_PREFIX)]
        tensors = convert_open_clip_checkpoint(encoder, read_tensors(file, names), prefix=OPEN_CLIP_PREFIX)
    # transformers 5 has no `text_model.` in CLIPTextModel, but in CLIPTextModelWithProjection
    outer = "text_model." if any(name.startswith("text_model.") for name in encoder.state_dict()) else ""
    named = {
        name if name == "text_projection.weight" else outer + name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
    }
    return _fill(encoder, named, device, dtype, f"text encoder {number + 1} in {info.path.name}")


def _text_config(shape: TextEncoderShape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions,
        "projection_dim": shape.projection or shape.width,
        "hidden_act": shape.activation,
        "layer_norm_eps": shape.norm_epsilon,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def _public(part: FolderPart) -> dict[str, Any]:
    """The configuration without the entries that describe the file itself."""
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


def _folder_tensors(part: FolderPart) -> dict[str, Tensor]:
    return {name: tensor for file in part.files for name, tensor in read_tensors(file, file.tensors).items()}


def _fill(network: Any, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype, what: str) -> Any:
    """The network, built on the meta device, with `tensors` as its weights: on `device` in `dtype`, frozen, eval."""
    wanted = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("position_ids")}
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise SpoError(f"the {what} is incomplete: {len(missing)} tensors are missing, such as {missing[0]}")
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            found, expected = list(tensors[name].shape), list(tensor.shape)
            raise SpoError(f"the {what} does not fit: {name} has the shape {found} where {expected} is expected")
    moved = {name: tensors.pop(name).to(device=device, dtype=dtype) for name in wanted}
    network.load_state_dict(moved, strict=False, assign=True)
    for module in network.modules():
        if isinstance(getattr(module, "position_ids", None), Tensor):  # 0, 1, 2, ...: not a weight
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return network.requires_grad_(False).eval()
