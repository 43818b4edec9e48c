"""What a small training on the command line reads, and its flags."""

from __future__ import annotations

from pathlib import Path

import torch

from spo.preference.cnn_file import save_cnn
from spo.preference.latent_cnn import LatentCNN
from tests.tiny_checkpoints import write_tiny_sd15, write_tiny_sdxl


def write_tiny_files(folder: Path) -> Path:
    """tiny.safetensors (SD1.5), tiny-xl.safetensors (SDXL), prompts.txt, and taste.safetensors, a random latent CNN."""
    write_tiny_sd15(folder / "tiny.safetensors", res_blocks=2, channels=(32, 32), depths=(1, 1))
    write_tiny_sdxl(folder / "tiny-xl.safetensors", res_blocks=2, channels=(32, 64), depths=(0, 1))
    (folder / "prompts.txt").write_text("a fox\na boat\na pear\n")
    torch.manual_seed(0)
    save_cnn(LatentCNN(16), folder / "taste.safetensors", {})
    return folder


def training_flags(files: Path, output: Path, *more: str, checkpoint: str = "tiny.safetensors") -> list[str]:
    """`spo train`'s flags for a run of six updates on the folder of `write_tiny_files`; later ones win."""
    values = {
        "checkpoint": files / checkpoint,
        "prompts": files / "prompts.txt",
        "preference": files / "taste.safetensors",
        "output": output,
        "width": 64,
        "height": 64,
        "sampling-steps": 4,
        "divert-start-step": 1,
        "candidates": 2,
        "threshold": 0,
        "prompts-per-batch": 2,
        "pairs-per-update": 2,
        "accumulation": 1,
        "steps": 6,
        "learning-rate": 1e-3,
        "save-every": 1,
        "device": "cpu",
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))] + list(more)
