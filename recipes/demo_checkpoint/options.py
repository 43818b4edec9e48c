"""What the stages are given: folders and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """flat, fluent: unpacked emoji packages; tokenizer: CLIP's; work: scratch; out: results; snapshots: checkpoints
    while the UNet trains, None for none. batch: noisy latents in a step, two of each picture."""

    flat: Path
    fluent: Path
    tokenizer: Path
    work: Path
    out: Path
    snapshots: Path | None
    threads: int
    vae_steps: int
    vae_colour_steps: int
    unet_minutes: float
    unet_lr: float
    batch: int
    classifier_minutes: float
    snapshot_minutes: float
