"""The headless host on tiny checkpoints: guidance, repeats, gradient checkpointing, a LoRA's round trip."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spo.algorithm.diffusion import scaled_linear_alphas_cumprod
from spo.config import build_config
from spo.errors import SpoError
from spo.headless.compare import adapter_from_file
from spo.headless.host import HeadlessHost, load_host
from spo.lora.read import read_lora
from spo.training.loop import ladder_of, train
from tests.tiny_checkpoints import write_tiny_sd15, write_tiny_sdxl
from tests.tiny_host import MeanOfChannel

PROMPTS = ["a fox", "a boat"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write_tiny_sd15(folder / "sd15.safetensors", res_blocks=2)
    write_tiny_sdxl(folder / "sdxl.safetensors", res_blocks=2)
    return folder


def config_for(checkpoints, architecture, tmp_path, **changes):
    values = {
        "checkpoint": str(checkpoints / f"{architecture}.safetensors"),
        "output": str(tmp_path / "a.safetensors"),
        "device": "cpu",
        "width": 64,
        "height": 128,
        "sampling_steps": 4,
        "divert_start_step": 1,
        "threshold": 0.0,
        "prompts_per_batch": 2,
        "steps": 2,
        "learning_rate": 1e-2,
        "save_precision": "float32",
        "negative_prompt": "blurry",
    }
    return build_config({**values, **changes}, architecture)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_the_file_gives_what_training_had(checkpoints, tmp_path, architecture):
    """Adapter in place at the end of training against the exported file put on a fresh network, float32."""
    config = config_for(checkpoints, architecture, tmp_path)
    host = load_host(config)
    seen = {}
    from spo.training import loop as trainer

    original = trainer._Run._write_lora

    def look_then_write(run, path):
        seen["live"] = host.sample(PROMPTS, [5, 6])
        return original(run, path)

    trainer._Run._write_lora = look_then_write
    try:
        train(host, config, PROMPTS, MeanOfChannel())
    finally:
        trainer._Run._write_lora = original
    base = host.sample(PROMPTS, [5, 6])
    fresh = load_host(config)
    fresh.prepare(PROMPTS)
    adapter_from_file(fresh, tmp_path / "a.safetensors")
    again = fresh.sample(PROMPTS, [5, 6])
    assert float((again - base).abs().max()) > 1e-3
    torch.testing.assert_close(again, seen["live"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_gradient_checkpointing_changes_memory_only(checkpoints, tmp_path, architecture):
    layers = {}
    for switched in (False, True):
        config = config_for(
            checkpoints, architecture, tmp_path / str(switched), gradient_checkpointing=switched, steps=1
        )
        train(load_host(config), config, PROMPTS, MeanOfChannel())
        layers[switched] = read_lora(config.run.output).layers
    for name, layer in layers[False].items():
        torch.testing.assert_close(layers[True][name].up, layer.up, rtol=1e-3, atol=1e-5)


def test_guidance_repeats_and_batches_agree(checkpoints, tmp_path):
    config = config_for(checkpoints, "sd15", tmp_path)
    host = load_host(config)
    host.prepare([*PROMPTS, "a much longer prompt, " * 30])  # two chunks for all
    assert host.conditioning(PROMPTS).cross_attention.shape[1] == 2 * 77
    together = host.sample(PROMPTS, [1, 2])
    apart = torch.cat([host.sample([prompt], [seed]) for prompt, seed in zip(PROMPTS, (1, 2), strict=True)])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-3)
    assert together.shape == (2, 3, 128, 64)
    unguided = HeadlessHost(host.model, config_for(checkpoints, "sd15", tmp_path, guidance_scale=1))
    unguided.prepare(PROMPTS)
    assert float((unguided.sample(PROMPTS, [1, 2]) - together).abs().max()) > 1e-2


def test_candidates_in_smaller_calls_give_the_same_pairs(checkpoints, tmp_path):
    from spo.training.loop import rollout_settings

    pairs = []
    for per_call in (0, 1):
        config = config_for(checkpoints, "sd15", tmp_path, candidates=3, candidates_per_call=per_call)
        host = load_host(config)
        host.prepare(PROMPTS)
        pairs.append(host.rollout(PROMPTS, [1, 2], rollout_settings(config), MeanOfChannel(), None).pairs)
    assert torch.equal(pairs[0].step, pairs[1].step)
    torch.testing.assert_close(pairs[0].next_win, pairs[1].next_win, rtol=1e-3, atol=1e-3)


def test_ladders_by_name_and_by_numbers():
    alphas = scaled_linear_alphas_cumprod()
    assert len(ladder_of(build_config({"sampling_steps": 7}), alphas)) == 8
    assert ladder_of(build_config({"sigmas": "4, 2.5, 1, 0"}), alphas).tolist() == [4, 2.5, 1, 0]
    for text, message in (("1,x", "falling numbers"), ("1,2", "cannot be a ladder")):
        with pytest.raises(SpoError, match=message):
            ladder_of(build_config({"sigmas": text}), alphas)


def test_scorers_see_what_the_decoder_gives(checkpoints, tmp_path, monkeypatch):
    """The published scorer clamps after its resize, so values beyond white and black must reach it."""
    host = load_host(config_for(checkpoints, "sd15", tmp_path))
    bright = SimpleNamespace(sample=torch.full((1, 3, 8, 8), 3.0))
    monkeypatch.setattr(host.model.vae, "decode", lambda latents: bright)
    assert float(host.decode(torch.zeros(1, 4, 1, 1)).max()) == 3.0
