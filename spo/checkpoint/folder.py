"""A checkpoint as diffusers saves it: a folder for each network, with its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.checkpoint.info import SCALE_FACTOR, CheckpointInfo, dtypes, parameters
from spo.checkpoint.kinds import Architecture, unet_kind
from spo.checkpoint.shapes import VOCABULARY, TextEncoderShape, UNetShape, VaeShape
from spo.checkpoint.tensor_file import TensorFile, open_tensor_file, read_json, refuse
from spo.checkpoint.webui_yaml import NoiseSchedule, PredictionType, prediction_word
from spo.errors import SpoError


@dataclass(frozen=True)
class FolderPart:
    """One network of a diffusers folder: its config.json, and its weight files (several when sharded)."""

    folder: Path
    config: Mapping[str, Any]
    files: tuple[TensorFile, ...]


def open_folder_part(folder: Path) -> FolderPart:
    """The network saved in `folder`, full precision before the fp16 variant; SpoError when something is missing."""
    if not (folder / "config.json").is_file():
        raise SpoError(f'"{folder}" has no config.json, so it is not a network saved by diffusers')
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for ending in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
            variant = ".fp16" if ending.startswith(".fp16") else ""
            shards = folder / f"{stem}{ending.removeprefix('.fp16')}.index{variant}.json"
            paths = [folder / f"{stem}{ending}"]
            if shards.is_file():
                paths = sorted({folder / name for name in read_json(shards).get("weight_map", {}).values()})
            if paths and (shards.is_file() or paths[0].is_file()):
                return FolderPart(folder, read_json(folder / "config.json"), tuple(map(open_tensor_file, paths)))
    raise SpoError(f'"{folder}" has a config.json but no weights (.safetensors or .bin)')


def inspect_folder(path: Path, override: PredictionType | None) -> CheckpointInfo:
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", "StableDiffusionPipeline"))
    if not pipeline.startswith("StableDiffusion") or pipeline.startswith("StableDiffusion3"):
        refuse(path, f"is a diffusers folder for {pipeline}; only SD 1.x and SDXL are supported")
    if not (path / "unet").is_dir():
        files = sorted(p.name for p in path.glob("*") if p.suffix in (".safetensors", ".ckpt"))
        some = f"; give one of its files, such as {files[0]}" if files else ""
        refuse(path, f"is a folder without unet/, so it is not a diffusers checkpoint{some}")
    unet_part = open_folder_part(path / "unet")
    config = unet_part.config
    architecture = _folder_architecture(path, config)
    wanted = ["vae", "text_encoder", *(["text_encoder_2"] if architecture == "sdxl" else [])]
    missing = [part for part in wanted if not (path / part).is_dir()]
    if missing:
        refuse(path, f"is a diffusers folder without {' and '.join(f'{part}/' for part in missing)}")
    vae_part, *text_parts = (open_folder_part(path / part) for part in wanted)
    scheduler_path = path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_path) if scheduler_path.is_file() else {}
    prediction, source = override, "as asked for"
    if prediction is None:
        word = scheduler.get("prediction_type")
        source = "from the scheduler's configuration" if word else "the usual one, the folder says nothing"
        prediction = prediction_word(str(word or "epsilon"), f"prediction_type in {scheduler_path}")
    parts = (unet_part, vae_part, *text_parts)
    counts = [sum(parameters(file.tensors, "") for file in part.files) for part in parts]
    defaults = NoiseSchedule()
    return CheckpointInfo(
        path=path,
        is_folder=True,
        architecture=architecture,
        prediction_type=prediction,
        prediction_source=source,
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        unet=_folder_unet_shape(config),
        vae=_folder_vae_shape(vae_part.config),
        text_encoders=tuple(_folder_text_shape(part, number) for number, part in enumerate(text_parts)),
        scale_factor=float(vae_part.config.get("scaling_factor", SCALE_FACTOR[architecture])),
        schedule=NoiseSchedule(
            float(scheduler.get("beta_start", defaults.beta_start)),
            float(scheduler.get("beta_end", defaults.beta_end)),
            str(scheduler.get("beta_schedule", defaults.beta_schedule)),
        ),
        dtypes=dtypes(unet_part.files[0].tensors, ""),
        size_bytes=sum(file.size_bytes for part in parts for file in part.files),
        unet_parameters=counts[0],
        vae_parameters=counts[1],
        text_parameters=sum(counts[2:]),
        config_path=None,
    )


def _folder_architecture(path: Path, config: Mapping[str, Any]) -> Architecture:
    is_xl = config.get("addition_embed_type") == "text_time"
    kind = unet_kind(is_xl, {int(config["cross_attention_dim"])}, int(config.get("in_channels", 4)))
    if kind.architecture is None:
        refuse(path, f"is {kind.text}; a text-to-image checkpoint of SD 1.x or SDXL is needed")
    return kind.architecture


def _folder_unet_shape(config: Mapping[str, Any]) -> UNetShape:
    channels = tuple(config["block_out_channels"])
    depth, heads = config.get("transformer_layers_per_block", 1), config.get("attention_head_dim", 8)
    depths = [depth] * len(channels) if isinstance(depth, int) else list(depth)
    attends = ["CrossAttn" in name for name in config["down_block_types"]]
    blocks = config.get("layers_per_block", 2)
    return UNetShape(
        channels=channels,
        res_blocks=blocks if isinstance(blocks, int) else blocks[0],
        depths=tuple(d if attending else 0 for d, attending in zip(depths, attends, strict=True)),
        middle_depth=depths[-1],
        heads=(heads,) * len(channels) if isinstance(heads, int) else tuple(heads),
        context_width=int(config["cross_attention_dim"]),
        linear_projection=bool(config.get("use_linear_projection", False)),
        added_width=int(config.get("projection_class_embeddings_input_dim") or 0),
    )


def _folder_vae_shape(config: Mapping[str, Any]) -> VaeShape:
    return VaeShape(
        channels=tuple(config["block_out_channels"]),
        res_blocks=int(config.get("layers_per_block", 1)),
        latent_channels=int(config.get("latent_channels", 4)),
    )


def _folder_text_shape(part: FolderPart, number: int) -> TextEncoderShape:
    config = part.config
    shape = TextEncoderShape(
        kind="clip" if number == 0 else "open_clip",
        width=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        mlp_width=int(config["intermediate_size"]),
        vocabulary=int(config.get("vocab_size", VOCABULARY)),
        positions=int(config.get("max_position_embeddings", 77)),
        projection=int(config.get("projection_dim", 512)) if number else 0,
        activation=str(config.get("hidden_act", "quick_gelu")),
        norm_epsilon=float(config.get("layer_norm_eps", 1e-5)),
    )
    if shape.vocabulary < VOCABULARY or shape.positions < 77:
        refuse(part.folder, f"has a text encoder for {shape.vocabulary} tokens at {shape.positions} places; "
                             f"CLIP's has {VOCABULARY} at 77")  # fmt: skip
    return shape
