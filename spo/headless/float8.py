"""Frozen weights stored in float8 (e4m3): half the memory of float16, computed in the precision of what comes in.

Each matrix is cast when it is used, in the backward pass again, so that no cast copy is kept for it; the gradient that
a LoRA gets is that of the cast weights. Weights are rounded to 3 bits of mantissa, so pictures differ a little from
those of the checkpoint. The first and last layers and the embeddings of time and size, which are small, stay as they
are. As the WebUI's "FP8 weight", without a scale: weights of Stable Diffusion are far from float8's limit of 448.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

_STAY = ("conv_in", "conv_out", "time_embedding", "add_embedding")


def store_in_float8(network: nn.Module) -> set[str]:
    """Make a UNet's linear and convolution layers compute from float8 weights; returns the weights' names.

    The network may be on the meta device; whoever gives it its weights stores those names in `torch.float8_e4m3fn`.
    """
    names = set()
    for name, module in network.named_modules():
        if name.startswith(_STAY) or type(module) not in (nn.Linear, nn.Conv2d):
            continue
        # no subclasses: peft makes a LoRA's own convolutions by the class of the layer that they adapt
        module.forward = partial(_linear if type(module) is nn.Linear else _convolution, module)
        names.add(f"{name}.weight")
    return names


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _LinearFunction.apply(x, layer.weight, layer.bias)


def _convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    shape = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return _ConvolutionFunction.apply(x, layer.weight, layer.bias, shape)


class _LinearFunction(torch.autograd.Function):
    """y = x W' + b with W stored in float8; dL/dx = dL/dy W. W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class _ConvolutionFunction(torch.autograd.Function):
    """Likewise of a convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.input_shape, ctx.shape = x.shape, shape
        return F.conv2d(x, weight.to(x.dtype), bias, *shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        given = conv2d_input(ctx.input_shape, weight.to(gradient.dtype), gradient, *ctx.shape)
        return given, None, None, None
