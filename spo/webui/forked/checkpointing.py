"""Gradient checkpointing of blocks that add to their input in place."""

from __future__ import annotations

from torch import nn

from spo.webui.a1111 import network as a1111


def set_gradient_checkpointing(network: nn.Module, on: bool) -> None:
    """As `a1111.set_gradient_checkpointing`; what is recomputed begins with the input as it was."""
    a1111.set_gradient_checkpointing(network, on, on_copies=True)
