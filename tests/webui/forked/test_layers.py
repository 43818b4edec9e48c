"""A Linear of their own for peft, and blocks that add in place for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spo.webui.forked import adding_in_place, linear_for_peft


class Linear(nn.Module):
    """As Forge's: not torch's, and it computes in its own way."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)))
        self.bias = None

    def forward(self, x):
        return 2 * nn.functional.linear(x, self.weight)


class BasicTransformerBlock(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.norm1, self.norm2, self.in_place = nn.LayerNorm(4), nn.LayerNorm(4), in_place
        self.attn1, self.ff = Linear(4, 4), nn.Linear(4, 4)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        for norm, layer in ((self.norm1, self.attn1), (self.norm2, self.ff)):
            n = layer(norm(x))
            if self.in_place:
                x += n
            else:
                x = x + n
        return x


def test_peft_takes_a_linear_that_computes_as_its_own_does():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(Linear(4, 4), nn.Linear(4, 4))
    x = torch.ones(1, 4)
    expected = network(x)
    with linear_for_peft(network):
        layer = network[0]
        assert isinstance(layer, nn.Linear) and isinstance(layer, Linear)
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), network, "spo")
        assert torch.equal(network(x), expected)
        network[0] = layer
    assert type(network[0]) is Linear and type(network[1]) is nn.Linear


def test_a_block_that_adds_in_place_has_the_gradients_of_one_that_does_not():
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))

    def gradients(in_place):
        block, x = BasicTransformerBlock(in_place), start.clone().requires_grad_()
        block(1 * x).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in block.parameters())]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(True)
    block = BasicTransformerBlock(True)
    x = start.clone().requires_grad_()
    with adding_in_place(block):
        block(1 * x).square().sum().backward()
    assert not block.norm1._forward_pre_hooks
    for found, expected in zip([x.grad, *(p.grad for p in block.parameters())], gradients(False), strict=True):
        torch.testing.assert_close(found, expected)
