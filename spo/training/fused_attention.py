"""What scaled dot product attention allocates on a card, without computing anything: never the matrix of weights.

Which kernel PyTorch (2.1 and later) takes for 4-dimensional query, key and value on CUDA:

- flash attention: float16 or bfloat16, no mask, heads up to 256 wide. Every attention of an SD UNet (40, 80 and 160
  wide in SD1.5, 64 in SDXL) and of CLIP's picture towers;
- memory-efficient attention: float32, or a mask, or wider heads; cards before Ampere take it for everything. So the
  attention in the middle of the VAE, one head 512 wide, in any precision. In half precision, heads more than 128 wide
  are accumulated in a float32 copy of the output;
- the formula with its rows x columns matrix: other dtypes and dimensions, and heads whose rows are not multiples of
  16 bytes. Those are not answered here.

Both fused kernels keep query, key, value, the output and one float32 number a row for the backward pass, and there
they sum the query's gradient (memory-efficient and wide heads: also the key's and the value's) in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLASH_WIDTH = 256  # widest head that flash attention takes
REGISTER_WIDTH = 128  # widest head whose output memory-efficient attention keeps in registers
_FUSED = (torch.float16, torch.bfloat16, torch.float32)


def is_fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a card has a fused kernel for these: [B, heads, rows, width], see above."""
    widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
    rows_aligned = all(width * query.element_size() % 16 == 0 for width in widths)
    return {query.ndim, key.ndim, value.ndim} == {4} and query.dtype in _FUSED and rows_aligned


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """[B, heads, rows, value width] without values, of `scaled_dot_product_attention`'s arguments; with gradient."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return _FusedAttention.apply(query, key, value, attn_mask)


class _FusedAttention(torch.autograd.Function):
    """Allocates, keeps and lets go of what the kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, rows, width = query.shape
        half = query.dtype != torch.float32
        ctx.flash = half and mask is None and width <= FLASH_WIDTH
        output = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
        if half and not ctx.flash and value.shape[-1] > REGISTER_WIDTH:
            output.new_empty(output.shape, dtype=torch.float32)
        log_sum_exp = query.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp, mask)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
        batch, heads, rows, width = query.shape
        float32 = torch.float32
        scratch = [query.new_empty(batch, heads, rows, dtype=float32)]  # row sums of gradient times output
        if ctx.flash:
            padded = (_up(rows, 128), _up(width, 32))
            scratch.append(query.new_empty(batch, heads, *padded, dtype=float32))
        elif query.dtype != float32:
            summed = gradients if width > REGISTER_WIDTH else gradients[:1]
            scratch += [torch.empty_like(tensor, dtype=float32) for tensor in summed]
        return *gradients, None


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
