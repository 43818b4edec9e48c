"""Weights and conditionings of inference mode enter autograd, without a copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spo.webui.forked import ordinary, ordinary_weights, outside_inference


def test_an_alias_has_the_same_memory_and_enters_autograd():
    with torch.inference_mode():
        whole = torch.arange(12.0).reshape(3, 4)
        part = whole.T[1:]
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="saved for backward"):
        (part @ x).sum().backward()
    alias = ordinary(part)
    assert alias.data_ptr() == part.data_ptr() and torch.equal(alias, part)
    (alias @ x).sum().backward()
    assert torch.equal(x.grad, part.sum(0))


class WithShape(dict):
    """A conditioning as the WebUIs' prompt parsers make it."""


def test_a_conditioning_keeps_its_kind_and_what_is_no_tensor():
    with torch.inference_mode():
        conditioning = WithShape(crossattn=torch.zeros(1, 2), vector=torch.ones(1))
    found = ordinary(conditioning)
    assert type(found) is WithShape and not any(value.is_inference() for value in found.values())
    plain = torch.zeros(1)
    assert ordinary(plain) is plain and ordinary("text") == "text"


def test_weights_become_ordinary_in_place():
    with torch.inference_mode():
        network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval().requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    memory = {key: value.data_ptr() for key, value in network.named_parameters()}
    ordinary_weights(network)
    assert not any(value.is_inference() for value in [*network.parameters(), *network.buffers()])
    assert {key: value.data_ptr() for key, value in network.named_parameters()} == memory
    assert not any(value.requires_grad for value in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    x = torch.ones(2, 3, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None
    weights = list(network.parameters())
    ordinary_weights(network)
    assert all(one is other for one, other in zip(network.parameters(), weights, strict=True))


def test_a_function_outside_of_inference_mode_makes_ordinary_tensors_without_gradients():
    @outside_inference
    def double(x):
        return 2 * x, torch.is_grad_enabled()

    with torch.inference_mode():
        made, gradients = double(torch.ones(2))
        assert torch.is_inference_mode_enabled()
    assert not made.is_inference() and not gradients
