"""A network's calls without gradient: run once for arguments of one shape, counted each time."""

from __future__ import annotations

import torch
from torch import nn

from spo.training.imaginary_card import imaginary_card
from spo.training.memory_ruler import Peak, Ruler
from spo.training.repeats import counted_once


class Network:
    """A hidden layer four times as wide as what goes in and out; counts its calls."""

    def __init__(self, device):
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).to(device)
        self.calls = 0

    def __call__(self, x, scale=1.0):
        self.calls += 1
        return (scale * self.layers(x),)


def peaks(calls, gradient=False, repeats=True):
    """(calls that were run, peak of all, bytes left) of `calls`: rows of each, all results held to the end."""
    with imaginary_card() as device, Ruler() as ruler, torch.set_grad_enabled(gradient):
        network = Network(device)
        once = counted_once(ruler, network) if repeats else network
        arguments = [torch.empty(rows, 8, device=device) for rows in calls]
        held = [once(x)[0] for x in arguments]
        assert [value.shape for value in held] == [x.shape for x in arguments]
        assert {value.device for value in held} == {device}
        return network.calls, ruler.peak, ruler.current_bytes


def test_the_same_peak_with_fewer_calls():
    calls, peak, left = peaks([5, 5, 7, 5, 7])
    assert calls == 2
    every_call, expected, expected_left = peaks([5, 5, 7, 5, 7], repeats=False)
    assert (every_call, expected, expected_left) == (5, peak, left)


def test_a_repeat_can_be_the_peak():
    """With the first one's result held, the second call rises higher."""
    _, one, _ = peaks([5])
    calls, two, _ = peaks([5, 5])
    assert calls == 1
    assert two == Peak(0, one.tensors_bytes + 2 * 5 * 8 * 4, 0)  # its argument and the first result


def test_with_gradient_each_call_is_run():
    assert peaks([5, 5], gradient=True)[0] == 2


def test_what_else_the_work_depends_on_counts():
    with imaginary_card() as device, Ruler() as ruler, torch.no_grad():
        network, is_on = Network(device), [True]
        once = counted_once(ruler, network, lambda: is_on[0])
        x = torch.empty(5, 8, device=device)
        once(x)
        once(x)
        assert network.calls == 1
        once(x, scale=2.0)
        is_on[0] = False
        once(x)
        once(x.half().float().t().contiguous().t())  # as many numbers, in another order
        assert network.calls == 4
