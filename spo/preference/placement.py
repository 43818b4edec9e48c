"""Where a preference model computes, and in what precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from spo.errors import SpoError

PRECISIONS = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Placement:
    """device: where the large networks compute; dtype: in what; rests: their weights wait in main memory meanwhile.

    Small networks, and whatever decides about small differences of scores, compute in float32 all the same.
    """

    device: torch.device
    dtype: torch.dtype
    rests: bool = False


ON_CPU = Placement(torch.device("cpu"), torch.float32)


def placement(device: torch.device | str, precision: str = "auto", *, rest_on_cpu: bool = False) -> Placement:
    """The placement for a setting of `preference_precision`: "auto" is float16 on a GPU and float32 on a CPU.

    float16, not bfloat16: scores differ by little within a pool, and float16 has three more bits for it; its range is
    no concern, since what can grow large stays in float32 (see `clip.towers`). Raises SpoError for a precision that is
    not known or that the device cannot compute in.
    """
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise SpoError(f'preference_precision is "{precision}"; accepted are {", ".join(PRECISIONS)}.')
    if precision == "auto":
        precision = "float32" if device.type == "cpu" else "float16"
    dtype: torch.dtype = getattr(torch, precision)
    one = torch.ones(1, 1, 1, 1, device=device, dtype=dtype)
    try:
        functional.layer_norm(functional.conv2d(one, one) @ one, (1,))
    except RuntimeError as error:
        raise SpoError(
            f"{precision} does not work on {device} here ({error}); use preference_precision float32."
        ) from error
    return Placement(device, dtype, rest_on_cpu and device.type != "cpu")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The WebUI samples under autocast; a preference model's precision is its own. Nothing where PyTorch has no
    autocast (Apple's MPS in the WebUI's version)."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()
