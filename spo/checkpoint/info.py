"""What `inspect_checkpoint` finds out about a checkpoint, as a record and as lines for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spo.checkpoint.kinds import TITLE, Architecture
from spo.checkpoint.shapes import TextEncoderShape, UNetShape, VaeShape
from spo.checkpoint.tensor_file import TensorEntry
from spo.checkpoint.webui_yaml import NoiseSchedule, PredictionType

SCALE_FACTOR: Mapping[Architecture, float] = {"sd15": 0.18215, "sdxl": 0.13025}


@dataclass(frozen=True)
class CheckpointInfo:
    """What `inspect_checkpoint` says.

    prediction_source   where the prediction type comes from, in words
    zero_terminal_snr   the checkpoint says that it was trained with its last noise level at zero signal
    vae, text_encoders  None / empty when they are not in the file
    scale_factor        network latent = VAE latent * scale_factor
    dtypes              of the UNet's tensors, the most frequent first, by safetensors' names
    *_parameters        numbers of weights; EMA copies and schedules in the file are not counted
    config_path         the yaml that was read, if any
    """

    path: Path
    is_folder: bool
    architecture: Architecture
    prediction_type: PredictionType
    prediction_source: str
    zero_terminal_snr: bool
    unet: UNetShape
    vae: VaeShape | None
    text_encoders: tuple[TextEncoderShape, ...]
    scale_factor: float
    schedule: NoiseSchedule
    dtypes: tuple[str, ...]
    size_bytes: int
    unet_parameters: int
    vae_parameters: int
    text_parameters: int
    config_path: Path | None

    @property
    def parameters(self) -> int:
        """Numbers of weights of all networks together."""
        return self.unet_parameters + self.vae_parameters + self.text_parameters


def describe(info: CheckpointInfo) -> list[str]:
    """The facts as short lines of text, for `spo inspect`."""
    unet = info.unet
    attention = ", ".join(
        f"{width}" + (f" x {depth} ({heads} heads)" if depth else "")
        for width, depth, heads in zip(unet.channels, unet.depths, unet.heads, strict=True)
    )
    missing = "not in the file"
    text = "; ".join(f"{e.kind} {e.width} wide, {e.layers} layers, {e.heads} heads" for e in info.text_encoders)
    vae = info.vae and f"{', '.join(map(str, info.vae.channels))}; scale factor {info.scale_factor:g}"
    lines = [
        f"file          {info.path}",
        f"layout        {'diffusers folder' if info.is_folder else 'single file'}, {info.size_bytes / 1e9:.2f} GB, "
        f"{'/'.join(info.dtypes)}",
        f"architecture  {TITLE[info.architecture]} ({info.architecture})",
        f"prediction    {info.prediction_type} ({info.prediction_source})"
        + (", zero terminal SNR" if info.zero_terminal_snr else ""),
        f"UNet          {info.unet_parameters / 1e6:.1f} M weights; channels x transformer blocks: {attention}; "
        f"middle x {unet.middle_depth}; text {unet.context_width} wide",
        f"VAE           {vae or missing}",
        f"text encoder  {text or missing}",
    ]
    return lines + ([f"yaml          {info.config_path}"] if info.config_path else [])


def parameters(tensors: Mapping[str, TensorEntry], prefix: str) -> int:
    floats = (e for name, e in tensors.items() if name.startswith(prefix) and e.dtype not in ("I64", "I32"))
    return sum(math.prod(entry.shape) for entry in floats)


def dtypes(tensors: Mapping[str, TensorEntry], prefix: str) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for name, entry in tensors.items():
        if name.startswith(prefix):
            counts[entry.dtype] = counts.get(entry.dtype, 0) + 1
    return tuple(sorted(counts, key=lambda dtype: -counts[dtype]))
