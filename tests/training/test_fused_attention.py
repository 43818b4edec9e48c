"""Attention of a card without the card: which inputs have a fused kernel, and the bytes it takes, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from spo.training.fused_attention import fused_attention, is_fused
from spo.training.imaginary_card import imaginary_card
from spo.training.memory_ruler import Ruler


@pytest.fixture
def card():
    with imaginary_card() as device, Ruler(device.type) as ruler:
        yield device, ruler


def attention_inputs(device, dtype, heads=4, width=64, rows=256):
    return [torch.zeros(2, heads, rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize(
    ("shape", "dtype", "fused"),
    [
        ((1, 8, 64, 40), torch.float16, True),
        ((1, 1, 64, 512), torch.bfloat16, True),
        ((1, 8, 64, 36), torch.float32, True),
        ((1, 8, 64, 36), torch.float16, False),  # 72 bytes a row: no multiple of 16
        ((1, 8, 64, 64), torch.float64, False),
        ((8, 64, 64), torch.float16, False),
    ],
)
def test_which_inputs_have_a_kernel(shape, dtype, fused):
    query = torch.empty(shape, dtype=dtype)
    assert is_fused(query, query, query) == fused


def test_rows_of_the_value_have_to_be_aligned_too():
    query, value = torch.empty(1, 2, 8, 64, dtype=torch.float16), torch.empty(1, 2, 8, 36, dtype=torch.float16)
    assert not is_fused(query, query, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_have_the_shapes_of_the_formula(dtype):
    """Queries and keys of different number, values of another width, a mask that wants no gradient."""
    query, key, value = (
        torch.zeros(2, 3, rows, width, dtype=dtype, requires_grad=True) for rows, width in ((10, 16), (7, 16), (7, 24))
    )
    mask = torch.ones(10, 7, dtype=torch.bool)
    output = fused_attention(query, key, value, mask)
    formula = functional.scaled_dot_product_attention(query, key, value, mask)
    assert (output.shape, output.dtype) == (formula.shape, formula.dtype)
    output.backward(torch.zeros_like(output))
    for tensor in (query, key, value):
        assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, dtype)


def test_flash_attention_keeps_a_number_a_row(card):
    device, ruler = card
    query, key, value = attention_inputs(device, torch.float16)
    one, row = 2 * 4 * 256 * 64 * 2, 2 * 4 * 256 * 4
    with torch.no_grad():
        functional.scaled_dot_product_attention(query, key, value)
    assert ruler.peak_bytes == 4 * one + row
    output = functional.scaled_dot_product_attention(query, key, value)
    assert output.shape == query.shape
    assert ruler.current_bytes == 4 * one + row
    output.backward(torch.zeros_like(output))
    # beside all that, the output's gradient, three gradients, the row sums, and the query's gradient in float32
    assert ruler.peak_bytes == 4 * one + row + one + 3 * one + row + 2 * one
    assert query.grad.shape == query.shape


def test_memory_efficient_attention_in_float32_needs_no_second_copy(card):
    device, ruler = card
    query, key, value = attention_inputs(device, torch.float32)
    one, row = 2 * 4 * 256 * 64 * 4, 2 * 4 * 256 * 4
    output = functional.scaled_dot_product_attention(query, key, value)
    output.backward(torch.zeros_like(output))
    assert ruler.peak_bytes == 4 * one + row + one + 3 * one + row


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 0), (torch.float16, 2), (torch.bfloat16, 2)])
def test_the_wide_head_of_a_vae(card, dtype, copies):
    """Memory-efficient attention: in half precision the output is summed in float32."""
    device, ruler = card
    query, key, value = attention_inputs(device, dtype, heads=1, width=512)
    one = query.numel() * query.element_size()
    with torch.no_grad():
        functional.scaled_dot_product_attention(query, key, value)
    row = 0 if copies else 2 * 256 * 4  # is not there yet while the copy is
    assert ruler.peak_bytes == (4 + copies) * one + row


def test_a_mask_is_no_matrix_of_weights(card):
    device, ruler = card
    query, key, value = attention_inputs(device, torch.float16)
    mask = torch.ones(1, 1, 256, 256, device=device, dtype=torch.bool)
    before = ruler.current_bytes
    with torch.no_grad():
        functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert ruler.peak_bytes == before + 2 * 256 * 256 + 2 * 4 * 256 * (64 * 2 + 4)


@pytest.mark.parametrize("width", [36, 64])
def test_without_a_kernel_there_is_the_matrix(card, width):
    """float64, and float16 heads whose rows are no multiple of 16 bytes: the formula, with its 256 x 256 matrix."""
    device, ruler = card
    dtype = torch.float64 if width == 64 else torch.float16
    with torch.no_grad():
        functional.scaled_dot_product_attention(*attention_inputs(device, dtype, width=width))
    assert ruler.peak_bytes > 2 * 4 * 256 * 256 * dtype.itemsize
