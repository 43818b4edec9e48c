"""Blocks that add to their input in place, recomputed in the backward pass."""

from __future__ import annotations

import torch
from torch import nn

from spo.webui.forked import adding_in_place, set_gradient_checkpointing


class BasicTransformerBlock(nn.Module):
    """As a Forge's: what is added changes the tensor that came in."""

    def __init__(self):
        super().__init__()
        self.norm1, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        x += self.inner(self.norm1(x))
        return x


def gradients(network, on):
    set_gradient_checkpointing(network, on)
    network.zero_grad()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with adding_in_place(network):
        network(x * 1.0).square().sum().backward()
    return [x.grad, *(weight.grad for weight in network.parameters())]


def test_gradients_are_those_without_it():
    torch.manual_seed(0)
    network = nn.Sequential(BasicTransformerBlock(), BasicTransformerBlock())
    plain, recomputed = gradients(network, False), gradients(network, True)
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(other, one)
    set_gradient_checkpointing(network, False)
    assert all("forward" not in vars(block) for block in network)
