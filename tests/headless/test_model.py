"""Predictions, pictures and gradients of loaded networks against those of their sources."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spo.algorithm.denoiser import Conditioning
from spo.errors import SpoError
from spo.headless.model import DiffusersModel
from tests.headless_models import assert_same_weights, inputs, load
from tests.tiny_checkpoints import (
    tiny_sd15,
    tiny_sdxl,
)


def test_sd15_equals_its_source(sd15: DiffusersModel) -> None:
    source = tiny_sd15()
    assert (sd15.architecture, sd15.prediction_type, sd15.latent_downscale) == ("sd15", "epsilon", 8)
    assert_same_weights(sd15, source)
    x, timesteps, conditioning = inputs(sd15)
    expected = source.unet(x, timesteps, conditioning.cross_attention).sample
    assert torch.equal(sd15.predict(x, timesteps, conditioning), expected)
    pictures = source.vae.decode(x / 0.18215).sample
    assert torch.equal(sd15.decoder.decode(x), pictures) and pictures.std() > 0.1
    assert conditioning.pooled is None and conditioning.size_ids is None


def test_sdxl_equals_its_source(sdxl: DiffusersModel) -> None:
    source = tiny_sdxl()
    assert_same_weights(sdxl, source)
    x, timesteps, conditioning = inputs(sdxl)
    assert conditioning.size_ids is not None
    assert conditioning.size_ids.tolist() == [[96.0, 64.0, 0.0, 0.0, 96.0, 64.0]] * 3
    added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.size_ids}
    expected = source.unet(x, timesteps, conditioning.cross_attention, added_cond_kwargs=added).sample
    assert torch.equal(sdxl.predict(x, timesteps, conditioning), expected)
    assert torch.equal(sdxl.decoder.decode(x), source.vae.decode(x / 0.13025).sample)


def test_outputs_depend_on_every_condition(sdxl: DiffusersModel) -> None:
    x, timesteps, c = inputs(sdxl)
    assert c.pooled is not None and c.size_ids is not None
    outputs = [
        sdxl.predict(x, timesteps, changed)
        for changed in (
            c,
            Conditioning(c.cross_attention.flip(0), c.pooled, c.size_ids),
            Conditioning(c.cross_attention, c.pooled.flip(0), c.size_ids),
            Conditioning(c.cross_attention, c.pooled, c.size_ids + 512),
        )
    ]
    assert all((outputs[0] - other).abs().max() > 1e-4 for other in outputs[1:])
    with pytest.raises(SpoError, match="needs pooled text features"):
        sdxl.predict(x, timesteps, Conditioning(c.cross_attention))


def test_gradient_reaches_the_latent_and_stops_nowhere(sd15: DiffusersModel) -> None:
    x, timesteps, conditioning = inputs(sd15)
    assert not conditioning.cross_attention.requires_grad and not conditioning.cross_attention.is_inference()
    sd15.predict(x.requires_grad_(), timesteps, conditioning).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with torch.no_grad():
        assert not sd15.predict(x, timesteps, conditioning).requires_grad


def test_timesteps_may_be_one_number_or_fractions(sd15: DiffusersModel) -> None:
    x, _, conditioning = inputs(sd15)
    one = sd15.predict(x, torch.tensor(500), conditioning)
    assert torch.equal(one, sd15.predict(x, torch.tensor([500, 500, 500]), conditioning))
    assert not torch.equal(one, sd15.predict(x, torch.tensor([500.5] * 3), conditioning))


def test_low_precision_networks_keep_the_callers_dtype(sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    for full in (sd15, sdxl):
        model = load(full.info.path, dtype=torch.bfloat16)
        assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in model.vae.network.decoder.parameters()} == {torch.float32}
        x, timesteps, conditioning = inputs(model)
        assert conditioning.cross_attention.dtype == torch.bfloat16
        assert conditioning.size_ids is None or conditioning.size_ids.dtype == torch.float32
        output, expected = model.predict(x, timesteps, conditioning), full.predict(*inputs(full))
        assert output.dtype == torch.float32 and model.decoder.decode(x.bfloat16()).dtype == torch.float32
        assert (output - expected).abs().mean() < 0.05 * expected.abs().mean()
        assert model.memory_bytes() < full.memory_bytes()


def test_gradient_checkpointing(sd15_path: Path, sdxl_path: Path) -> None:
    for path in (sd15_path, sdxl_path):
        model = load(path)
        trained = model.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight.requires_grad_()
        runs: list[str] = []
        blocks = model.unet.down_blocks
        for name, part in {
            "resnets": blocks[2].resnets[0],
            "attentions": blocks[1].attentions[0].transformer_blocks[0],
        }.items():
            part.register_forward_pre_hook(lambda *_, runs=runs, name=name: runs.append(name))
        gradients = []
        for enabled in (False, True, False):
            model.set_gradient_checkpointing(enabled)
            runs.clear()
            trained.grad = None
            output = model.predict(*inputs(model))
            output.square().mean().backward()
            assert sorted(runs) == sorted(["resnets", "attentions"] * (2 if enabled else 1))
            assert trained.grad is not None
            gradients.append(trained.grad.clone())
        assert gradients[0].any() and all(torch.allclose(gradients[0], g, rtol=1e-4, atol=1e-9) for g in gradients[1:])
        assert not any(module.training for module in model.unet.modules())
