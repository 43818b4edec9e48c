"""What the stages are given: folders and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Options:
    """flat, fluent: unpacked emoji packages; tokenizer: CLIP's; work: scratch; out: results; snapshots: checkpoints
    while the UNet trains, None for none. batch: noisy latents in a step, two of each picture. save_every: steps.
    checkpoint: whose autoencoder is kept, and whose UNet and text encoder learn on; None: from nothing."""

    flat: Path
    fluent: Path
    tokenizer: Path
    work: Path
    out: Path
    checkpoint: Path | None
    snapshots: Path | None
    threads: int
    device: str
    vae_steps: int
    unet_steps: int
    core_steps: int
    unet_lr: float
    batch: int
    classifier_steps: int
    save_every: int

    @property
    def place(self) -> torch.device:
        """Where networks are trained; auto: the GPU where there is one."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)
