"""What of the loaded model is set aside while it is borrowed, and put back exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from spo.webui.a1111.loras import lora_extension
from spo.webui.forge.checkpoint import Checkpoint
from spo.webui.forked import (
    active_networks,
    adding_in_place,
    linear_for_peft,
    ordinary_weights,
    outside_inference,
    plain_names_in,
)

_MOVES = ("load_models_gpu", "free_memory")  # of backend.memory_management


@contextmanager
def pinned(checkpoint: Checkpoint) -> Iterator[None]:
    """What is sampled inside is sampled from this checkpoint, and leaves networks and prompt history as they were.

    Forge loads what the page says before each picture. Inside it does not; the page's own change is followed by the
    next generation.
    """
    from modules import processing, sd_models, shared

    def stay() -> tuple[Any, bool]:
        return checkpoint.model, False

    put_back = active_networks(checkpoint.model)
    with ExitStack() as stack:
        stack.callback(put_back)
        for owner in (sd_models, processing):
            stack.callback(setattr, owner, "forge_model_reload", owner.forge_model_reload)
            owner.forge_model_reload = stay
        stack.callback(setattr, shared.cmd_opts, "no_prompt_history", shared.cmd_opts.no_prompt_history)
        shared.cmd_opts.no_prompt_history = True  # our sampling must not become the user's last prompt
        yield


@contextmanager
def trainable(checkpoint: Checkpoint) -> Iterator[None]:
    """The network as rollouts and training need it, both alike; afterwards as it was.

    Attention that keeps no matrix for the backward pass; Linears that peft takes; weights moved and merged as ordinary
    tensors and by their plain names, whatever adapter is in place. They stay ordinary, with the same memory.
    """
    from backend import memory_management

    network = checkpoint.network
    flags = {name: weight.requires_grad for name, weight in network.named_parameters()}
    with ExitStack() as stack:
        stack.callback(_set_flags, network, flags)
        for name in _MOVES:
            move = getattr(memory_management, name)
            stack.callback(setattr, memory_management, name, move)
            setattr(memory_management, name, outside_inference(move))
        named = [(memory_management, name) for name in _MOVES]
        stack.enter_context(plain_names_in(network, [*named, (lora_extension(), "load_networks")]))
        stack.enter_context(linear_for_peft(network))
        stack.enter_context(adding_in_place(network))
        stack.enter_context(_memory_saving_attention())
        ordinary_weights(network)
        yield


def _set_flags(network: nn.Module, flags: dict[str, bool]) -> None:
    for name, weight in network.named_parameters():
        weight.requires_grad_(flags.get(name, False))


@contextmanager
def _memory_saving_attention() -> Iterator[None]:
    """Scaled dot product attention, unless Forge's is as saving."""
    from backend import attention
    from backend.nn import unet

    former = unet.attention_function
    if former is not getattr(attention, "attention_xformers", None):
        unet.attention_function = attention.attention_pytorch
    try:
        yield
    finally:
        unet.attention_function = former
