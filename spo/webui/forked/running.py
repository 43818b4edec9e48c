"""What A1111's WebUI needs around a network, and Forges do by themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from spo.webui.a1111.checkpoint import Checkpoint


def autocast() -> AbstractContextManager[Any]:
    """Nothing: their layers cast by themselves."""
    return nullcontext()


def has_moved(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Never: they take the network from the card as they need room, and `denoiser` brings it back."""
    return False


def keep_adapter_precision(network: nn.Module) -> None:
    """Nothing: only layers of their own cast by hand, so the adapter's are as peft made them."""
