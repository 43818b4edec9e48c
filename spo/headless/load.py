"""A checkpoint's networks are loaded through diffusers and transformers, offline.

Every configuration is derived from `inspect_checkpoint`, so no hub and no shipped configuration is needed, and small
checkpoints load like full ones.

Weights are read by `weights.Source`, in portions, not by diffusers' `from_pretrained` and `from_single_file`: these
keep a whole file mapped while they convert it, so that of a network in another precision than its file's both are
resident.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.checkpoint.folder import FolderPart, open_folder_part
from spo.checkpoint.info import CheckpointInfo
from spo.checkpoint.inspect import inspect_checkpoint
from spo.checkpoint.kinds import OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from spo.checkpoint.shapes import TextEncoderShape, UNetShape, clip_prefix, vae_shape
from spo.checkpoint.tensor_file import TensorFile, open_tensor_file, read_tensors
from spo.checkpoint.webui_yaml import NoiseSchedule
from spo.errors import SpoError
from spo.headless.float8 import store_in_float8
from spo.headless.model import DiffusersModel
from spo.headless.taesd import load_taesd
from spo.headless.text import TextEncoders
from spo.headless.vae import Side, Vae
from spo.headless.weights import Source, ready
from spo.training.memory import is_out_of_memory

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
    vae_tiles: bool = False,
    vae_rests: bool = False,
    taesd_path: Path | str | None = None,
    float8: bool = False,
) -> DiffusersModel:
    """The checkpoint at `path` (see `inspect_checkpoint`, also for `prediction_type` and `config_path`), frozen.

    dtype       of the UNet, the text encoders and the text features
    vae_path    a VAE instead of the checkpoint's: an LDM file (.safetensors, .pt, .ckpt; `first_stage_model.` before
                its names or not; a whole checkpoint too), or a diffusers folder
    vae_dtype   None: float32 on a CPU or beside a float32 network, else what `vae.half_dtype` finds
    vae_tiles   decode in tiles from the beginning
    vae_rests   keep the VAE's weights in main memory, and on the device only while it is used
    taesd_path  a TAESD that decodes in the VAE's place
    float8      store the UNet's weights in float8, see there

    Raises SpoError when something is missing, is of another kind, or does not fit, and when memory runs out.
    """
    info = inspect_checkpoint(path, config_path=config_path, prediction_type=prediction_type)
    if not info.text_encoders:
        raise SpoError(f'"{info.path.name}" holds no text encoder, so prompts cannot be encoded; use a full checkpoint')
    if info.vae is None and vae_path is None:
        raise SpoError(f'"{info.path.name}" holds no VAE: give one, a file or a diffusers folder')
    device = torch.device(device)
    if dtype == torch.float32 and vae_dtype is None:
        vae_dtype = torch.float32
    try:
        vae = _load_vae(info, None if vae_path is None else Path(vae_path), device, vae_dtype, vae_tiles, vae_rests)
        if taesd_path is None:
            vae.use("decoder")
        tiny_dtype = torch.float32 if device.type == "cpu" else dtype
        return DiffusersModel(
            info=info,
            vae=vae,
            taesd=None if taesd_path is None else load_taesd(Path(taesd_path), device, tiny_dtype),
            load_text_encoders=_text_encoders_later(info, device, dtype),
            unet=_load_unet(info, device, dtype, float8),
            alphas_cumprod=_alphas_cumprod(info),
            device=device,
            dtype=dtype,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SpoError(
            f"Out of memory while {info.path.name} was loaded onto {device}: choose precision float16 or bfloat16, "
            "weight_storage float8, or free memory that other programs hold."
        ) from error


# ---------------------------------------------------------------------------------------------- the noise schedule


def _alphas_cumprod(info: CheckpointInfo) -> Tensor:
    """[1000] float32, of the file's table where it has one, else of its configuration."""
    alphas = _schedule_alphas_cumprod(info.schedule)
    file = None if info.is_folder else open_tensor_file(info.path)
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
    """[1000] float64. By hand, as the WebUI does: diffusers' schedulers multiply in float32, 5e-7 off."""
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


def _load_unet(info: CheckpointInfo, device: torch.device, dtype: torch.dtype, float8: bool) -> Any:
    unet = empty_unet(info)
    in_float8 = store_in_float8(unet) if float8 else set()
    what = f"UNet in {info.path.name}"
    if info.is_folder:
        source = Source(open_folder_part(info.path / "unet").files, "", dict)
    else:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        file = open_tensor_file(info.path)
        source = Source([file], UNET_PREFIX, lambda tensors: convert_ldm_unet_checkpoint(tensors, dict(unet.config)))
        unused = len(source.names(file)) - len(unet.state_dict().keys() & source.converted().keys())
        if unused:
            warnings.warn(f"{info.path.name}: {unused} tensors of its UNet have no known use, left out", stacklevel=4)
    source.check(unet, what)
    source.fill(unet, device, dtype, in_float8=in_float8)
    return ready(unet, device)


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
    override: Path | None,
    device: torch.device,
    dtype: torch.dtype | None,
    tiles: bool,
    rests: bool,
) -> Vae:
    """The VAE without weights; it reads them when they are needed, but what is missing is said now."""
    network, source = _vae_and_source(info, override)
    source.check(network, f"VAE in {(override or info.path).name}")
    ready(network, device)

    def read(side: Side, device: torch.device, dtype: torch.dtype) -> None:
        parts = {"decoder": ("decoder.", "post_quant_conv."), "encoder": ("encoder.", "quant_conv.")}
        source.fill(network, device, dtype, only=parts[side])
        network.requires_grad_(False)

    return Vae(
        network, read, scale_factor=info.scale_factor, device=device, dtype=dtype, tiled=tiles, rest_on_cpu=rests
    )


def _vae_and_source(info: CheckpointInfo, override: Path | None) -> tuple[Any, Source]:
    if override is None:
        if info.is_folder:
            return _vae_in_folder(info.path / "vae", info.scale_factor)
        return _vae_in_file(open_tensor_file(info.path), VAE_PREFIX, info.scale_factor)
    if override.is_dir():
        inner = override / "vae" if (override / "vae").is_dir() else override
        return _vae_in_folder(inner, info.scale_factor)
    file = open_tensor_file(override)
    for prefix in (VAE_PREFIX, ""):
        if f"{prefix}decoder.conv_in.weight" in file.tensors and f"{prefix}encoder.conv_in.weight" in file.tensors:
            if any(entry.startswith(f"{prefix}decoder.up_blocks.") for entry in file.tensors):
                raise SpoError(f'"{override.name}" has diffusers names: give the folder that holds its config.json')
            return _vae_in_file(file, prefix, info.scale_factor)
    raise SpoError(f'"{override.name}" is not a VAE: it holds no encoder and decoder')


def _vae_in_file(file: TensorFile, prefix: str, scale_factor: float) -> tuple[Any, Source]:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    shape = vae_shape(file, prefix)
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

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        return convert_ldm_vae_checkpoint(bare, dict(vae.config))

    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return vae, Source([file], tuple(prefix + part for part in parts), convert)


def _vae_in_folder(folder: Path, scale_factor: float) -> tuple[Any, Source]:
    from diffusers import AutoencoderKL

    part = open_folder_part(folder)
    kind = part.config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL" or part.config.get("latent_channels", 4) != 4:
        raise SpoError(f'"{folder}" holds a {kind}, not a Stable Diffusion VAE (AutoencoderKL, 4 latent channels)')
    with torch.device("meta"):
        vae = AutoencoderKL.from_config({**_public(part), "scaling_factor": scale_factor})
    new_names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        converted = {}
        for name, tensor in tensors.items():
            *before, layer, leaf = name.split(".")
            converted[".".join([*before, new_names.get(layer, layer), leaf])] = tensor
        return converted

    return vae, Source(part.files, "", convert)


def _text_encoders_later(info: CheckpointInfo, device: torch.device, dtype: torch.dtype) -> Callable[[], TextEncoders]:
    """What reads the text encoders; that they are complete is checked now."""
    for number in range(len(info.text_encoders)):
        _empty_text_encoder(info, number)

    def read() -> TextEncoders:
        networks = []
        for number in range(len(info.text_encoders)):
            network, source = _empty_text_encoder(info, number)
            source.fill(network, device, dtype)
            networks.append(ready(network, device))
        return TextEncoders(info.architecture, networks, device)

    return read


def _empty_text_encoder(info: CheckpointInfo, number: int) -> tuple[Any, Source]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = info.text_encoders[number]
    with torch.device("meta"):
        config = CLIPTextConfig(**_text_config(shape))
        network: Any = CLIPTextModelWithProjection(config) if shape.projection else CLIPTextModel(config)
    # transformers 5 has no `text_model.` in CLIPTextModel, but in CLIPTextModelWithProjection
    outer = "text_model." if any(name.startswith("text_model.") for name in network.state_dict()) else ""

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name if name == "text_projection.weight" else outer + name.removeprefix("text_model."): tensor
            for name, tensor in tensors.items()
        }

    if info.is_folder:
        folder = info.path / ("text_encoder" if number == 0 else "text_encoder_2")
        source = Source(open_folder_part(folder).files, "", renamed)
    elif shape.kind == "clip":
        file = open_tensor_file(info.path)
        prefix = clip_prefix(file, info.architecture)
        source = Source(
            [file], prefix, lambda tensors: renamed({n.removeprefix(prefix): t for n, t in tensors.items()})
        )
    else:
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        source = Source(
            [open_tensor_file(info.path)],
            OPEN_CLIP_PREFIX,
            lambda tensors: renamed(convert_open_clip_checkpoint(network, tensors, prefix=OPEN_CLIP_PREFIX)),
        )
    source.check(network, f"text encoder {number + 1} in {info.path.name}")
    return network, source


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
