"""Adapters leave no trace: fresh, switched off and taken out, the network's output is bit for bit what it was."""

from __future__ import annotations

import copy

import pytest
import torch

from spo.errors import SpoError
from spo.lora.adapter import Adapter, modules_of_kinds
from spo.lora.layer import LoraLayer
from tests.conftest import float16
from tests.tiny_checkpoints import tiny_sd15, tiny_sdxl

DTYPES = [torch.float32, float16, torch.bfloat16]


def network_and_call(architecture, dtype):
    unet = copy.deepcopy((tiny_sd15 if architecture == "sd15" else tiny_sdxl)(res_blocks=2).unet).to(dtype)
    width = unet.config.cross_attention_dim
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=noise).to(dtype)
    text = torch.randn(2, 7, width, generator=noise).to(dtype)
    added = None
    if architecture == "sdxl":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(2, pooled, generator=noise).to(dtype), "time_ids": torch.ones(2, 6)}
    return unet, lambda: unet(x, torch.tensor([500.0, 20.0]), text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_fresh_off_and_removed_are_bit_identical(architecture, dtype):
    unet, call = network_and_call(architecture, dtype)
    with torch.no_grad():
        base = call()
    tree = [(name, id(module), module.training) for name, module in unet.named_modules()]
    flags = [(name, p.requires_grad, id(p)) for name, p in unet.named_parameters()]
    adapter = Adapter(unet, modules_of_kinds(unet, ["attention", "feed-forward", "convolution"]), rank=3, alpha=6)
    with torch.no_grad():
        assert torch.equal(call(), base)
        for weight in adapter.parameters():
            weight.normal_(std=0.1)
        changed = call()
        assert not torch.equal(changed, base)
        with adapter.off():
            assert torch.equal(call(), base)
        assert torch.equal(call(), changed)
        adapter.set_multiplier(0)
        assert torch.equal(call(), base)
        adapter.set_multiplier(1)
        assert torch.equal(call(), changed)
    call().float().square().sum().backward()
    trained = {id(weight) for weight in adapter.parameters()}
    assert all((p.grad is not None) == (id(p) in trained) for p in unet.parameters())
    assert all(weight.dtype == torch.float32 for weight in adapter.parameters())
    adapter.remove()
    adapter.remove()
    with torch.no_grad():
        assert torch.equal(call(), base)
    assert [(name, id(module), module.training) for name, module in unet.named_modules()] == tree
    assert [(name, p.requires_grad, id(p)) for name, p in unet.named_parameters()] == flags
    assert not hasattr(unet, "peft_config")


def test_the_start_is_a_function_of_seed_and_module():
    unet, _ = network_and_call("sd15", torch.float32)
    modules = modules_of_kinds(unet, ["attention"])

    def start(chosen, seed):
        adapter = Adapter(unet, chosen, rank=4, alpha=4, seed=seed)
        tensors = {name: value.clone() for name, value in adapter.state_dict().items()}
        adapter.remove()
        return tensors

    all_of_them, some, other = start(modules, 1), start(modules[3:5], 1), start(modules, 2)
    assert all(torch.equal(all_of_them[name], value) for name, value in some.items())
    down = [name for name in all_of_them if name.endswith(".down")]
    assert not any(torch.equal(all_of_them[name], other[name]) for name in down)
    spread = torch.cat([all_of_them[name].flatten() for name in down]).std()
    assert float(spread) == pytest.approx(1 / 4, rel=0.02)  # gaussian, deviation 1 / rank
    assert all(float(all_of_them[name].abs().max()) == 0 for name in all_of_them if name.endswith(".up"))


def test_a_start_keeps_each_layers_rank_and_alpha_and_is_the_reference():
    unet, call = network_and_call("sd15", torch.float32)
    modules = modules_of_kinds(unet, ["attention"])
    shapes = {name: unet.get_submodule(name).weight.shape for name in modules[:2]}
    start = {
        name: LoraLayer(torch.randn(rank, shape[1]), torch.randn(shape[0], rank), alpha)
        for (name, shape), rank, alpha in zip(shapes.items(), (2, 5), (1.0, 10.0), strict=True)
    }
    with torch.no_grad():
        for name, layer in start.items():  # by hand: the same change added to the weights
            unet.get_submodule(name).weight += layer.alpha / layer.rank * layer.up @ layer.down
        by_hand = call()
        for name, layer in start.items():
            unet.get_submodule(name).weight -= layer.alpha / layer.rank * layer.up @ layer.down
        base = call()
        adapter = Adapter(unet, modules, rank=4, alpha=4, start=start)
        torch.testing.assert_close(call(), by_hand, rtol=1e-3, atol=1e-4)
        begun = call()
        for weight in adapter.parameters():
            weight += 0.05
        with adapter.reference():
            assert torch.equal(call(), begun)
        assert not torch.equal(call(), begun)
        adapter.use_base_as_reference()
        with adapter.reference():
            torch.testing.assert_close(call(), base, rtol=1e-3, atol=1e-4)
    kept = adapter.weights()
    assert [(kept[name].rank, kept[name].alpha) for name in modules[:3]] == [(2, 1.0), (5, 10.0), (4, 4.0)]


def test_refuses_a_second_adapter_and_unknown_kinds():
    unet, _ = network_and_call("sd15", torch.float32)
    adapter = Adapter(unet, modules_of_kinds(unet, ["attention"]), rank=1, alpha=1)
    with pytest.raises(SpoError, match="carries a peft adapter already"):
        Adapter(unet, ["conv_in"], rank=1, alpha=1)
    adapter.remove()
    with pytest.raises(SpoError, match='did you mean "attention"'):
        modules_of_kinds(unet, ["atention"])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_in_half_precision_the_adapter_computes_there_and_learns_in_float32(dtype):
    """Against peft's own forward, which computes the adapter in float32."""
    unet, call = network_and_call("sd15", dtype)
    adapter = Adapter(unet, modules_of_kinds(unet, ["attention", "convolution"]), rank=4, alpha=8)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.normal_(std=0.05)

    def output_and_gradient():
        output = call().float()
        gradient = torch.autograd.grad(output.square().mean(), adapter.parameters())
        with torch.no_grad():
            torch.testing.assert_close(call().float(), output.detach(), rtol=2e-2, atol=2e-2)
        return output.detach(), torch.cat([value.flatten() for value in gradient])

    output, gradient = output_and_gradient()
    for layer in adapter.layers.values():
        del layer.forward
    by_peft, gradient_by_peft = output_and_gradient()
    assert gradient.dtype == torch.float32
    similar = torch.nn.functional.cosine_similarity
    assert float(similar(output.flatten(), by_peft.flatten(), 0)) > 0.999
    assert float(similar(gradient, gradient_by_peft, 0)) > 0.99
