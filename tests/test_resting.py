"""Weights that come to a device for a while: here the meta device, on which tensors are empty shells."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spo.resting import Resting


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)


def weights(network):
    return [*network.parameters(), *network.buffers()]


def places(network):
    return {value.device.type for value in weights(network)}


def test_awake_is_on_the_device_and_back(network):
    before = [value.clone() for value in weights(network)]
    resting = Resting(network, torch.device("meta"))
    with resting.awake():
        assert places(network) == {"meta"}
        with resting.awake():
            pass
        assert places(network) == {"meta"}
    assert all(torch.equal(a, b) for a, b in zip(before, weights(network), strict=True))


def test_an_error_puts_all_back(network):
    resting = Resting(network, torch.device("meta"))
    with pytest.raises(RuntimeError, match="out of memory"), resting.awake():
        raise RuntimeError("CUDA out of memory")
    assert places(network) == {"cpu"}
    assert torch.isfinite(network(torch.ones(2, 3))).all()


def test_memory_that_runs_out_on_the_way_puts_all_back(network, monkeypatch):
    resting = Resting(network, torch.device("meta"))
    last = resting._weights[-1].at_rest
    to = torch.Tensor.to

    def full(value, *args, **kwargs):
        if value is last:
            raise RuntimeError("CUDA out of memory")
        return to(value, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(RuntimeError, match="out of memory"), resting.awake():
        pytest.fail("awake")
    assert places(network) == {"cpu"}


def test_a_part_of_a_network(network):
    with Resting(network, torch.device("meta"), lambda name: name.startswith("1.")).awake():
        assert [value.device.type for value in network.parameters()] == ["cpu", "cpu", "meta", "meta"]
