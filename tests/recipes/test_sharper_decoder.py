"""A decoder with crisp edges: what changes in the file, that it goes on, and how the critic's gradient is held."""

from __future__ import annotations

import pytest
import torch

from recipes.demo_checkpoint import sharper_decoder
from recipes.demo_checkpoint.sharper_decoder import ADVERSARIAL, Critic, balanced, critic_loss, main
from recipes.demo_checkpoint.taken import VAE_PREFIX, read_vae
from spo.checkpoint.tensor_file import open_tensor_file, read_tensors
from spo.demo.judge import HERE


def made(emoji, out, steps):
    folders = [f"--flat={emoji / 'flat'}", f"--fluent={emoji / 'fluent'}", f"--work={emoji / 'work'}"]
    main([*folders, f"--out={emoji / out}", f"--steps={steps}", "--batch=2", "--save-every=1", "--threads=1"])
    file = open_tensor_file(emoji / out / "demo.safetensors")
    return read_tensors(file, file.tensors)


def test_only_the_decoder_changes_and_a_cut_off_run_goes_on(emoji, monkeypatch):
    monkeypatch.setattr(sharper_decoder, "HEAD_START", 1)
    first = made(emoji, "cut", 2)
    then = made(emoji, "out", 3)
    file = open_tensor_file(HERE / "demo.safetensors")
    old = read_tensors(file, file.tensors)
    assert set(then) == set(old)
    changed = {name for name in old if not torch.equal(then[name].float(), old[name].float())}
    trained = tuple(f"{VAE_PREFIX}{part}." for part in ("decoder", "post_quant_conv"))
    assert changed and all(name.startswith(trained) for name in changed)
    assert any(not torch.equal(first[name], then[name]) for name in changed)
    assert read_vae(emoji / "out" / "demo.safetensors").decode(torch.randn(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
    for state in (emoji / "work").glob("*.state"):
        state.unlink()
    at_once = made(emoji, "at_once", 3)
    assert all(torch.equal(at_once[name], then[name]) for name in then)


def test_the_critic_alone_begins(emoji, monkeypatch):
    """Before the decoder learns anything from it."""
    monkeypatch.setattr(sharper_decoder, "HEAD_START", 2)
    tensors = made(emoji, "out", 2)
    file = open_tensor_file(HERE / "demo.safetensors")
    old = read_tensors(file, file.tensors)
    assert all(torch.equal(tensors[name].float(), old[name].float()) for name in old)


def test_the_critics_gradient_is_a_part_of_the_others():
    weight = torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    losses, adversarial = (weight**2).sum(), 1e3 * (weight**3).sum()
    alone = torch.autograd.grad(losses, weight, retain_graph=True)[0]
    both = torch.autograd.grad(balanced(losses, adversarial, weight), weight)[0]
    assert float((both - alone).norm() / alone.norm()) == pytest.approx(ADVERSARIAL, rel=1e-3)


def test_the_critic_learns_to_tell_pictures_apart():
    torch.manual_seed(0)
    critic, true = Critic(), torch.rand(8, 3, 64, 64).round()
    logits, features = critic(true)
    assert logits.shape == (8, 1, 16, 16) and len(features) == 3
    blurred = torch.nn.functional.avg_pool2d(true, 3, 1, 1)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3)
    before = critic_loss(critic, true, blurred)
    for _ in range(10):
        optimizer.zero_grad()
        critic_loss(critic, true, blurred).backward()
        optimizer.step()
    assert critic_loss(critic, true, blurred) < 0.5 * before
