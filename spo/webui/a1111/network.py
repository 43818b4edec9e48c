"""The loaded checkpoint's network: evaluated as the WebUI's samplers do, with gradients where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spo.webui.a1111.checkpoint import Checkpoint


def denoiser(checkpoint: Checkpoint) -> Any:
    """The network as k-diffusion's samplers see it, for `evaluate`: its output turned into the clean latent."""
    import k_diffusion.external
    from modules import shared

    constructor = getattr(checkpoint.model, "create_denoiser", None)
    if constructor is not None:
        return constructor()
    external = k_diffusion.external
    wrapper = external.CompVisVDenoiser if checkpoint.prediction_type == "v_prediction" else external.CompVisDenoiser
    return wrapper(checkpoint.model, quantize=shared.opts.enable_quantization)


def evaluate(inner: Any, x: Tensor, sigma: Tensor, conditioning: Sequence[Any]) -> Tensor:
    """[N, C, H, W] denoised by a `denoiser` in one call; no guidance.

    x [N, C, H, W] VE; sigma [N]; conditioning: tensors [k, L, D], or SDXL's dicts of such, N rows in all, one L
    """
    image = x.new_zeros(len(x), 5, 1, 1)  # the WebUI's stand-in for models without image conditioning
    text: dict[str, Any]
    if isinstance(conditioning[0], dict):
        text = {key: torch.cat([one[key] for one in conditioning]) for key in conditioning[0]}
    else:
        text = {"c_crossattn": [torch.cat(list(conditioning))]}
    return inner(x, sigma, cond={**text, "c_concat": [image]})


def compute_dtype() -> torch.dtype:
    """The precision that `autocast` computes the network in, whatever its weights are stored in."""
    from modules import devices

    if devices.fp8 and devices.device.type == "cpu":
        return torch.bfloat16
    full = torch.float32 in (devices.dtype, devices.dtype_inference) and not devices.fp8
    return torch.float32 if full else devices.dtype


def weights_in_float8() -> bool:
    """The "FP8 weight" setting as it is in force."""
    from modules import devices

    return bool(devices.fp8)


def autocast() -> AbstractContextManager[Any]:
    """The precision in which the WebUI runs the network."""
    from modules import devices

    return devices.without_autocast() if devices.unet_needs_upcast else devices.autocast()


def network_to_card(checkpoint: Checkpoint) -> None:
    """With --medvram, bring the UNet to the card as its own forward does; an optimizer's state is made where it is."""
    if checkpoint.low_memory != "--medvram":
        return
    for hook in checkpoint.model.model._forward_pre_hooks.values():
        if getattr(hook, "__name__", "") == "send_me_to_gpu":  # of modules.lowvram, which keeps the books
            hook(checkpoint.model.model, ())


def has_moved(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether the network, once on this device, was taken away: unloaded. With --medvram it comes and goes."""
    now = next(checkpoint.network.parameters()).device
    return now.type == "meta" or (not checkpoint.low_memory and now != device)


def keep_adapter_precision(network: nn.Module) -> None:
    """Adapter layers compute in the precision of their float32 weights where the WebUI casts by hand.

    Its `manual_cast` would round each layer's weights to float16 and back at every forward, for good. It patches the
    forward of the classes, so one of the layer's own wins. May be called again and again.
    """
    for name, layer in network.named_modules():
        if (".lora_A." in name or ".lora_B." in name) and "forward" not in layer.__dict__:
            if isinstance(layer, nn.Linear):
                layer.__dict__["forward"] = partial(_linear, layer)
            elif isinstance(layer, nn.Conv2d):
                layer.__dict__["forward"] = partial(_convolution, layer)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)


def _convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return layer._conv_forward(x.to(layer.weight.dtype), layer.weight, layer.bias)


def set_gradient_checkpointing(network: nn.Module, on: bool, *, on_copies: bool = False) -> None:
    """Recompute the transformer and residual blocks in the backward pass, or not; leaves no trace when off.

    The blocks' own `use_checkpoint` fails when the weights are frozen, and the WebUI turns it off.

    on_copies  for blocks that change their input, which is needed once more: they get a copy each time
    """
    for block in network.modules():
        if type(block).__name__ in ("BasicTransformerBlock", "ResBlock"):
            block.__dict__.pop("forward", None)
            if on:
                forward = partial(_on_a_copy, block.forward) if on_copies else block.forward
                block.forward = partial(_checkpointed, forward)


def _on_a_copy(forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return forward(x.clone(), *args, **kwargs)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
