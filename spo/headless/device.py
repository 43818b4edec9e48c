"""Which device computes, and in which precision."""

from __future__ import annotations

import torch

from spo.errors import SpoError


def choose_device(name: str) -> torch.device:
    """The device that a name means; "auto": CUDA, Apple's, or the CPU. SpoError when it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SpoError(
            f'device "{name}" cannot be used here ({reason}); accepted are auto, cpu, cuda, cuda:1, mps.'
        ) from None
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen network; auto: float16 on a GPU, float32 on a CPU. SpoError when it cannot compute."""
    if precision == "auto":
        precision = "float32" if device.type == "cpu" else "float16"
    dtype = getattr(torch, precision)
    try:
        one = torch.ones(1, 1, device=device, dtype=dtype)
        one @ one
    except RuntimeError:
        raise SpoError(f"precision {precision} does not work on {device} with this PyTorch; use float32.") from None
    return dtype


def card_size_gib(name: str) -> float | None:
    """Memory of the CUDA card that a device's name means; None where it means something else."""
    device = choose_device(name)
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
