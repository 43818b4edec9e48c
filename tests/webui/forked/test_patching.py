"""Weights merged by name, and put back, while an adapter is in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spo.webui.forked import adapters_aside, plain_names_in


class Patcher:
    """As the WebUIs': it merges by names, keeps a backup, and merges once."""

    def __init__(self, network):
        self.network, self.backup, self.merges = network, {}, 0

    def patch(self, change):
        if self.backup:
            return
        for name, weight in list(self.network.named_parameters()):
            if name in change:
                self.backup[name] = weight
                self._set(name, nn.Parameter(weight + change[name], requires_grad=False))
                self.merges += 1

    def unpatch(self):
        for name, weight in self.backup.items():
            self._set(name, weight)
        self.backup = {}

    def _set(self, name, weight):
        place, _, leaf = name.rpartition(".")
        setattr(self.network.get_submodule(place), leaf, weight)


@pytest.fixture
def network():
    from spo.lora.adapter import Adapter

    pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    network.adapter = [Adapter(network, ["0"], rank=2, alpha=2)]
    return network


def test_a_lora_is_merged_with_an_adapter_in_place_once_and_taken_out(network):
    adapter = network.adapter[0]
    original = adapter.layers["0"].base_layer.weight.clone()
    patcher, change = Patcher(network), {"0.weight": torch.ones(3, 3), "1.weight": torch.ones(3, 3)}
    x = torch.ones(1, 3)
    plain = network(x)
    patcher.patch(change)
    assert patcher.merges == 1  # one of the two alone: what this is about
    patcher.unpatch()
    functions = [(Patcher, "patch"), (Patcher, "unpatch"), (Patcher, "of_another_webui")]
    with plain_names_in(network, functions):
        for _ in range(2):
            patcher.patch(change)
        assert patcher.merges == 3
        assert torch.equal(adapter.layers["0"].base_layer.weight, original + 1)
        assert network.get_submodule("0") is adapter.layers["0"]
        assert not torch.equal(network(x), plain)
        patcher.unpatch()
    assert torch.equal(network(x), plain)
    assert not hasattr(Patcher.patch, "__wrapped__")
    adapter.remove()
    assert torch.equal(network(x), plain)


def test_calls_within_calls_set_nothing_aside_twice(network):
    layer = network.get_submodule("0")
    with pytest.raises(KeyError), adapters_aside(network), adapters_aside(network):
        assert network.get_submodule("0") is layer.base_layer
        raise KeyError
    assert network.get_submodule("0") is layer
