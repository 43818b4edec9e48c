"""Another host: one class with the members of `training.host.Host`. It touches no other file of the package.

This one has no checkpoint, no VAE and no text encoder: a network of one attention-like layer over latents of 4 x 4, and
prompts that are vectors. It is all that training, sampling and saving need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spo.algorithm.diffusion import scaled_linear_alphas_cumprod
from spo.algorithm.preference import PreferenceModel
from spo.algorithm.rollout import PoolVerdict, Rollout, RolloutSettings, Scoring, sample_spo
from spo.config import Config
from spo.lora.read import read_lora
from spo.rng import SeededDraws, generator
from spo.training.host import Host, ladder_of
from spo.training.loop import train
from tests.tiny_host import PROMPTS, MeanOfChannel, small

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


class OneLayer(nn.Module):
    """x - x_0 is predicted by one linear layer of the latent and the prompt's vector."""

    def __init__(self) -> None:
        super().__init__()
        part: nn.Module = nn.Linear(72, 64)
        part.weight.data = 0.02 * torch.randn(64, 72, generator=generator("layer"))
        nn.init.zeros_(part.bias)
        for name in reversed(LAYER.split(".")[1:]):
            whole = nn.Module()
            whole.add_module(name, part)
            part = whole
        self.add_module(LAYER.split(".")[0], part)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        layer = self.get_submodule(LAYER)
        return layer(torch.cat([x.flatten(1), prompts], 1)).unflatten(1, (4, 4, 4))


class VectorHost:
    """A `Host` in some sixty lines."""

    architecture, naming, prediction_type = "sd15", "diffusers", "epsilon"
    device, dtype = torch.device("cpu"), torch.float32
    checkpoint_name, checkpoint_hash = "one layer", ""

    def __init__(self, config: Config) -> None:
        self.network: nn.Module = OneLayer()
        self.alphas_cumprod = scaled_linear_alphas_cumprod()
        self.sigmas = ladder_of(config, self.alphas_cumprod)
        self.decode_batch = 1

    def prepare(self, prompts: Sequence[str]) -> None:
        self.vectors = {prompt: torch.randn(8, generator=generator(prompt)) for prompt in prompts}

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self.vectors[prompt] for prompt in prompts])

    def rollout(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RolloutSettings,
        preference: PreferenceModel | None,
        watch: Callable[[PoolVerdict], None] | None,
    ) -> Rollout:
        def model(x: Tensor, sigma: Tensor, prompts: Sequence[str]) -> Tensor:
            return self.denoise(x, sigma, prompts, torch.zeros(len(x)))

        def repeat(arguments: Any, count: int) -> dict[str, list[str]]:
            return {"prompts": list(arguments["prompts"]) * count}

        draws = SeededDraws(seeds)
        return sample_spo(
            model,
            draws.initial((4, 4, 4)) * self.sigmas[0],
            self.sigmas,
            {"prompts": list(prompts)},
            settings=settings,
            draws=draws,
            alphas_cumprod=self.alphas_cumprod,
            scoring=None if preference is None else Scoring(preference, prompts, self.decode, watch),
            repeat=repeat,
        )

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[str], step: Tensor) -> Tensor:
        weight = (1 / (1 + sigma**2))[:, None, None, None]  # the exact denoiser of standard normal latents ...
        scaled = x * weight.sqrt()
        return weight * x + 0.1 * self.network(scaled, torch.stack([self.vectors[one] for one in prompts]))  # ... bent

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].tanh().repeat_interleave(8, 2).repeat_interleave(8, 3)

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        raise AssertionError("training encodes no pictures")

    def set_gradient_checkpointing(self, on: bool) -> None:
        pass


def test_another_host_trains(tmp_path):
    config = small(tmp_path, steps=4, sample_every=2)
    host: Host = VectorHost(config)
    report = train(host, config, PROMPTS, MeanOfChannel())
    assert report.finished
    layers = read_lora(report.output).layers
    assert len(layers) == 1
    assert all(float(layer.up.abs().max()) > 0 for layer in layers.values())
    assert len(report.files.all_samples()) == 3
