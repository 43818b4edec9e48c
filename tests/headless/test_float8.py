"""Weights stored in float8 against the same weights cast: outputs, gradients, LoRAs, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spo.headless.float8 import store_in_float8
from spo.lora.adapter import Adapter, modules_of_kinds
from tests.headless_models import inputs, load

FLOAT8 = torch.float8_e4m3fn


def cast_weights(unet: nn.Module, names: set[str]) -> nn.Module:
    """The oracle: an ordinary network whose weights are rounded to float8."""
    for name, parameter in unet.named_parameters():
        if name in names:
            parameter.data = parameter.data.to(FLOAT8).to(parameter.dtype)
    return unet


def in_float8(unet: nn.Module) -> set[str]:
    return {name for name, parameter in unet.named_parameters() if parameter.dtype == FLOAT8}


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
@pytest.mark.parametrize("kinds", [["attention"], ["attention", "feed-forward", "convolution"]])
def test_outputs_and_lora_gradients_are_those_of_the_cast_weights(
    request: pytest.FixtureRequest, architecture: str, kinds: list[str]
) -> None:
    path: Path = request.getfixturevalue(f"{architecture}_path")
    stored, plain = load(path, float8=True), load(path)
    names = in_float8(stored.unet)
    cast_weights(plain.unet, names)
    results: list[tuple[Tensor, Tensor, list[Tensor]]] = []
    for model in (stored, plain):
        x, timesteps, conditioning = inputs(model)
        adapter = Adapter(model.unet, modules_of_kinds(model.unet, kinds), rank=2, alpha=2.0)
        for parameter in adapter.parameters():
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        output = model.predict(x.requires_grad_(), timesteps, conditioning)
        output.square().mean().backward()
        assert x.grad is not None
        results.append((output.detach(), x.grad, [parameter.grad for parameter in adapter.parameters()]))
        with torch.no_grad(), adapter.off():
            results[-1][2].append(model.predict(*inputs(model)))
        adapter.remove()
    (output, gradient, rest), (output_of_cast, gradient_of_cast, rest_of_cast) = results
    assert torch.equal(output, output_of_cast) and gradient.any()
    torch.testing.assert_close(gradient, gradient_of_cast, rtol=1e-4, atol=1e-6)
    for mine, expected in zip(rest, rest_of_cast, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    assert in_float8(stored.unet) == names  # also after the adapter was taken out


def test_which_weights_and_how_much_memory(sdxl_path: Path) -> None:
    full, stored = load(sdxl_path, dtype=torch.bfloat16), load(sdxl_path, dtype=torch.bfloat16, float8=True)
    names = in_float8(stored.unet)
    modules = dict(stored.unet.named_modules())
    assert all(isinstance(modules[name.removesuffix(".weight")], nn.Linear | nn.Conv2d) for name in names)
    assert not any(name.startswith(("conv_in", "conv_out", "time_embedding", "add_embedding")) for name in names)
    assert next(stored.unet.parameters()).dtype == torch.bfloat16  # what asks a network for its dtype hears this
    elements = sum(parameter.numel() for name, parameter in stored.unet.named_parameters() if name in names)
    assert full.memory_bytes() - stored.memory_bytes() == elements
    assert elements > 0.8 * stored.info.unet_parameters
    output, expected = stored.predict(*inputs(stored)), full.predict(*inputs(full))
    assert 0 < (output - expected).abs().mean() < 0.2 * expected.abs().mean()


def test_nothing_but_the_float8_weight_is_kept_for_the_backward_pass() -> None:
    layers: Any = nn.Sequential(nn.Linear(32, 32), nn.Conv2d(4, 4, 3, padding=1)).requires_grad_(False)
    names = store_in_float8(layers)
    assert names == {"0.weight", "1.weight"}
    for layer in layers:
        layer.weight.data = layer.weight.data.to(FLOAT8)
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        layers[0](torch.zeros(2, 32, requires_grad=True))
        layers[1](torch.zeros(2, 4, 8, 8, requires_grad=True))
    assert kept == [FLOAT8, FLOAT8]


def test_weights_beyond_float8_are_limited_not_lost(tmp_path: Path, sd15_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(sd15_path)
    name = "model.diffusion_model.input_blocks.1.0.out_layers.3.weight"
    tensors[name][0, 0, 0, 0] = 1000.0
    save_file(tensors, tmp_path / "x.safetensors")
    weight = load(tmp_path / "x.safetensors", float8=True).unet.down_blocks[0].resnets[0].conv2.weight
    assert weight.dtype == FLOAT8 and weight.float().max() == 448
