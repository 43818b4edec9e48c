"""What of the loaded model is set aside while it is borrowed, and put back exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from spo.webui.a1111.checkpoint import Checkpoint, is_loaded
from spo.webui.a1111.loras import active_networks


@contextmanager
def pinned(checkpoint: Checkpoint) -> Iterator[None]:
    """What is sampled inside is sampled from this checkpoint, and leaves networks and prompt history as they were.

    The WebUI looks at its settings before each picture, and loads what is chosen there: another checkpoint, or the same
    one in FP8. Inside it does not; the page's own change of the setting waits for the queue and is done afterwards.
    """
    from modules import shared

    networks, history = active_networks(), shared.cmd_opts.no_prompt_history
    with staying(checkpoint):
        shared.cmd_opts.no_prompt_history = True  # our sampling must not become the user's last prompt
        try:
            yield
        finally:
            shared.cmd_opts.no_prompt_history = history
            for put_back in networks:
                put_back()


@contextmanager
def staying(checkpoint: Checkpoint) -> Iterator[None]:
    """Inside, the WebUI does not load what is chosen on the page; where it would have loaded this checkpoint in another
    way it does so afterwards.
    """
    from modules import sd_models

    load, afresh = sd_models.reload_model_weights, list[bool]()

    def stay(sd_model: Any = None, info: Any = None, forced_reload: bool = False) -> Any:
        if info is None or info is checkpoint.info:
            afresh.append(forced_reload)
            return checkpoint.model
        return load(sd_model, info, forced_reload)  # somebody means it: `is_loaded` says so

    sd_models.reload_model_weights = stay
    try:
        yield
    finally:
        sd_models.reload_model_weights = load
        if any(afresh) and is_loaded(checkpoint):
            load(checkpoint.model, checkpoint.info, forced_reload=True)


@contextmanager
def trainable(checkpoint: Checkpoint) -> Iterator[None]:
    """The network as rollouts and training need it, both alike; afterwards as it was.

    Attention that keeps no matrix for the backward pass; no Hypertile, token merging or tiling of the last generation
    left in the modules; with --medvram nothing left on the card.
    """
    from modules import lowvram, sd_hijack, sd_models

    model = checkpoint.model
    merged = getattr(model, "applied_token_merged_ratio", 0)
    tiling = sd_hijack.model_hijack.circular_enabled
    with _memory_saving_attention(), _without_hypertile(model):
        sd_models.apply_token_merging(model, 0)
        sd_hijack.model_hijack.apply_circular(False)
        try:
            yield
        finally:
            if is_loaded(checkpoint):
                sd_hijack.model_hijack.apply_circular(tiling)
                sd_models.apply_token_merging(model, merged)
            if checkpoint.low_memory:
                lowvram.send_everything_to_cpu()


@contextmanager
def _memory_saving_attention() -> Iterator[None]:
    """Scaled dot product attention, unless the user's is as saving: Doggettx keeps matrices [tokens, tokens]."""
    import ldm.modules.attention
    import sgm.modules.attention
    from modules import sd_hijack, sd_hijack_optimizations

    if getattr(sd_hijack.current_optimizer, "name", "") in ("xformers", "sdp", "sdp-no-mem"):
        yield
        return
    classes = (ldm.modules.attention.CrossAttention, sgm.modules.attention.CrossAttention)
    before = [attention.forward for attention in classes]
    for attention in classes:
        attention.forward = sd_hijack_optimizations.scaled_dot_product_attention_forward
    try:
        yield
    finally:
        for attention, forward in zip(classes, before, strict=True):
            attention.forward = forward


@contextmanager
def _without_hypertile(model: nn.Module) -> Iterator[None]:
    """Hypertile wraps the forward of single modules and leaves it there, switched on, until the next generation."""
    wrapped = [
        (module, module.__dict__.pop("forward"))
        for module in model.modules()
        if "__webui_hypertile_params" in module.__dict__ and "forward" in module.__dict__
    ]
    try:
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward
