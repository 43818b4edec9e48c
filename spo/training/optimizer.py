"""The optimizer of a LoRA, its loss scaling, and updates that survive a lack of memory or an overflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spo.config import OptimizerConfig
from spo.errors import SpoError


def make_optimizer(parameters: Sequence[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW as configured; fused on CUDA, where it needs no memory but its moments'. SpoError without bitsandbytes."""
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        on_cuda = all(parameter.is_cuda for parameter in parameters)
        return torch.optim.AdamW(parameters, **arguments, fused=True if on_cuda else None)
    try:
        import bitsandbytes
    except ImportError:
        raise SpoError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes, or use adamw.") from None
    return bitsandbytes.optim.AdamW8bit(parameters, **arguments)


def make_scaler(device: torch.device, dtype: torch.dtype) -> Any:
    """Loss scaling where the network computes in float16, whatever its weights are stored in; else it does nothing."""
    fp16 = dtype == torch.float16
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.type, enabled=fp16)
    return torch.cuda.amp.GradScaler(enabled=fp16 and device.type == "cuda")  # torch before 2.3: on CUDA only


@contextmanager
def repeatable_first_step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A first step inside, which makes the moments, can be done again when it fails: weights and optimizer are as
    before. Later steps need no memory that lasts, and are not copied.
    """
    if optimizer.state:
        yield
        return
    before = [parameter.detach().cpu().clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)
        optimizer.state.clear()
        raise


@contextmanager
def fast_cuda_math(device: torch.device) -> Iterator[None]:
    """TF32 and cuDNN's search for the fastest kernels, as the published code; as it was, afterwards. CUDA only."""
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    former = (cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)
    cudnn.benchmark = cudnn.allow_tf32 = matmul.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = former


@contextmanager
def compiled(network: nn.Module, wanted: bool) -> Iterator[None]:
    """The network's forward through torch.compile while inside, when wanted."""
    if not wanted:
        yield
        return
    plain = network.forward
    network.forward = torch.compile(plain)  # type: ignore[method-assign]
    try:
        yield
    finally:
        network.__dict__.pop("forward", None)
        if network.forward != plain:  # it was an instance's own before
            network.forward = plain  # type: ignore[method-assign]
