"""What has nothing to do in a fork."""

from __future__ import annotations

import torch

from spo.webui.forked import autocast, has_moved, keep_adapter_precision


def test_layers_cast_by_themselves():
    linear, x = torch.nn.Linear(2, 2), torch.zeros(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16  # what A1111's would do
    with autocast():
        assert linear(x).dtype == torch.float32


def test_a_network_that_was_taken_from_the_card_has_not_moved_for_good():
    assert has_moved(None, torch.device("meta")) is False


def test_an_adapter_stays_as_it_was_made():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2).half())
    forwards = [module.forward for module in network.modules()]
    keep_adapter_precision(network)
    assert network[0].weight.dtype == torch.float16
    assert [module.forward for module in network.modules()] == forwards
