"""The optimizer's first step, loss scaling, and switches that are put back."""

from __future__ import annotations

import pytest
import torch

from spo.config import build_config
from spo.training.optimizer import compiled, fast_cuda_math, make_optimizer, make_scaler, repeatable_first_step


def test_a_first_step_that_fails_can_be_done_again():
    torch.manual_seed(0)
    start = torch.randn(5)
    gradient = torch.randn(5)
    settings = build_config({"learning_rate": 1e-2, "weight_decay": 0.1}).optimizer

    def stepped(fails):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        optimizer = make_optimizer([weight], settings)
        if fails:
            with pytest.raises(MemoryError), repeatable_first_step(optimizer, [weight]):
                optimizer.step()
                raise MemoryError
            assert torch.equal(weight.detach(), start) and not optimizer.state
        with repeatable_first_step(optimizer, [weight]):
            optimizer.step()
        return weight.detach()

    assert torch.equal(stepped(True), stepped(False))
    assert not torch.equal(stepped(False), start)


def test_later_steps_are_not_copied():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([weight], build_config({}).optimizer)
    weight.grad = torch.ones(2)
    optimizer.step()
    after = weight.detach().clone()
    with pytest.raises(MemoryError), repeatable_first_step(optimizer, [weight]):
        weight.data.add_(1)
        raise MemoryError
    assert torch.equal(weight.detach(), after + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_network_that_computes_in_float16_scales_its_loss(dtype):
    assert not make_scaler(torch.device("cpu"), dtype).is_enabled()


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="this PyTorch scales on CUDA only")
def test_a_network_that_computes_in_float16_scales_its_loss():
    assert make_scaler(torch.device("cpu"), torch.float16).is_enabled()


def test_cuda_switches_stay_as_they_are_elsewhere_and_come_back():
    switches = torch.backends.cudnn, torch.backends.cuda.matmul

    def state():
        return switches[0].benchmark, switches[0].allow_tf32, switches[1].allow_tf32

    before = state()
    with fast_cuda_math(torch.device("cpu")):
        assert state() == before
    with pytest.raises(KeyError), fast_cuda_math(torch.device("cuda")):
        assert state() == (True, True, True)
        raise KeyError
    assert state() == before


def test_a_compiled_network_is_itself_again(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *arguments: calls.append(1) or forward(*arguments))
    network = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    with compiled(network, False):
        network(x)
    assert not calls
    with compiled(network, True):
        assert torch.equal(network(x), torch.nn.functional.linear(x, network.weight, network.bias))
    assert len(calls) == 1
    network(x)
    assert len(calls) == 1 and "forward" not in network.__dict__
    own = lambda x: x  # noqa: E731
    network.forward = own
    with compiled(network, True):
        network(x)
    assert len(calls) == 2 and network.forward is own
