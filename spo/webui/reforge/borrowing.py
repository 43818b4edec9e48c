"""What of the loaded model is set aside while it is borrowed, and put back exactly, in reForge and Forge classic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from spo.webui.a1111.borrowing import staying
from spo.webui.a1111.checkpoint import Checkpoint, is_loaded
from spo.webui.a1111.loras import lora_extension
from spo.webui.forked import active_networks, adding_in_place, ordinary_weights, plain_names_in

# what looks modules up by name, or merges and moves weights: of reForge, and of Forge classic
_PATCHING = (
    "add_patches",
    "detach",
    "get_key_patches",
    "load",
    "model_state_dict",
    "partially_load",
    "partially_unload",
    "patch_model",
    "unpatch_model",
)


@contextmanager
def pinned(checkpoint: Checkpoint) -> Iterator[None]:
    """What is sampled inside is sampled from this checkpoint, and leaves LoRAs and prompt history as they were.

    The WebUI looks at its settings before each picture, and loads what is chosen there. Inside it does not; the page's
    own change of the setting waits for the queue and is done afterwards.
    """
    put_back = active_networks(checkpoint.model)
    with staying(checkpoint), _without_prompt_history():
        try:
            yield
        finally:
            if is_loaded(checkpoint):
                put_back()


@contextmanager
def _without_prompt_history() -> Iterator[None]:
    """Our sampling must not become the user's last prompt. Forge classic has no flag for it, so the file is kept."""
    from modules import paths, shared

    flags = shared.cmd_opts
    if hasattr(flags, "no_prompt_history"):
        former, flags.no_prompt_history = flags.no_prompt_history, True
        try:
            yield
        finally:
            flags.no_prompt_history = former
        return
    file = Path(paths.data_path) / "params.txt"
    text = file.read_bytes() if file.is_file() else None
    try:
        yield
    finally:
        if text is not None:
            file.write_bytes(text)
        else:
            file.unlink(missing_ok=True)


@contextmanager
def trainable(checkpoint: Checkpoint) -> Iterator[None]:
    """The network as rollouts and training need it, both alike; afterwards as it was.

    Weights that autograd takes, blocks that can be differentiated, attention that keeps no matrix for the backward
    pass, no tiling of the last generation; LoRAs are merged and taken out by names that no adapter hides.
    """
    from modules import processing

    model, network = checkpoint.model, checkpoint.network
    tiling = model.tiling_enabled
    ordinary_weights(network)
    with _names(model, network), _differentiable(network), _memory_saving_attention(), _schedule_in_force(model):
        processing.apply_circular_forge(model, False)
        try:
            yield
        finally:
            if is_loaded(checkpoint):
                processing.apply_circular_forge(model, tiling)


def _names(model: Any, network: nn.Module) -> Any:
    kind = type(model.forge_objects.unet)
    owners = [one for one in kind.__mro__ if one.__name__ in ("ModelPatcher", kind.__name__)]
    functions = [(owner, name) for owner in owners for name in _PATCHING]
    return plain_names_in(network, [*functions, (lora_extension(), "load_networks")])


def _differentiable(network: nn.Module) -> Any:
    """Forge classic's blocks add in place; their forward is `_forward` by way of a checkpoint. reForge's do not."""
    in_place = any(
        type(one).__name__ == "BasicTransformerBlock" and hasattr(one, "_forward") for one in network.modules()
    )
    return adding_in_place(network) if in_place else nullcontext()


@contextmanager
def _schedule_in_force(model: Any) -> Iterator[None]:
    """Zero terminal SNR, by the settings or by the file, which reForge puts in for the time of sampling alone.

    Inside it holds all the time, for the training step too, and sampling finds it as it is. Forge classic changes the
    levels of its samplers when it loads, and those of the network never.
    """
    from modules import processing, sd_models, shared

    rescaled = getattr(processing, "rescale_zero_terminal_snr_sigmas", None)
    wanted = getattr(model, "ztsnr", False) or getattr(shared.opts, "sd_noise_schedule", "") == "Zero Terminal SNR"
    if rescaled is None or not wanted:
        yield
        return
    sampling, override = model.forge_objects.unet.model.model_sampling, sd_models.apply_alpha_schedule_override
    levels, alphas = sampling.sigmas, model.alphas_cumprod
    sampling.set_sigmas(rescaled(levels))
    if not getattr(shared.opts, "use_old_clip_g_load_and_ztsnr_application", False):
        model.alphas_cumprod_original = alphas
        override(model)
    processing.rescale_zero_terminal_snr_sigmas = lambda sigmas: sigmas
    sd_models.apply_alpha_schedule_override = lambda *_, **__: None
    try:
        yield
    finally:
        processing.rescale_zero_terminal_snr_sigmas = rescaled
        sd_models.apply_alpha_schedule_override = override
        sampling.set_sigmas(levels)
        model.alphas_cumprod = alphas


@contextmanager
def _memory_saving_attention() -> Iterator[None]:
    """Scaled dot product attention, unless the user's is xformers' or the like: the others keep matrices."""
    from ldm_patched.ldm.modules import attention

    former = attention.optimized_attention
    if former.__name__ not in ("attention_basic", "attention_split", "attention_sub_quad"):
        yield
        return
    attention.optimized_attention = attention.attention_pytorch
    try:
        yield
    finally:
        attention.optimized_attention = former
