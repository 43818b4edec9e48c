"""A small real host for tests of the training loop: a diffusers UNet with attention, prompts as random features."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from spo.algorithm.denoiser import Conditioning, GuidedDenoiser
from spo.algorithm.diffusion import scaled_linear_alphas_cumprod
from spo.algorithm.preference import Candidates
from spo.algorithm.rollout import RolloutSettings, Scoring, sample_spo
from spo.config import Config, build_config
from spo.headless.host import repeat_conditioning
from spo.lora.layer import LoraLayer
from spo.lora.read import read_lora
from spo.rng import SeededDraws, generator
from spo.runs.layout import RunFiles
from spo.training.host import ladder_of
from tests.tiny_checkpoints import tiny_sd15

WIDTH = 32


PROMPTS = ["a fox", "a boat", "a pear"]


def small(folder, **changes):
    """A configuration for short runs of the tiny host into `folder`."""
    values = {
        "checkpoint": "tiny.safetensors",
        "prompts": "prompts.txt",
        "output": str(folder / "taste.safetensors"),
        "width": 64,
        "height": 64,
        "sampling_steps": 4,
        "divert_start_step": 1,
        "candidates": 2,
        "prompts_per_batch": 2,
        "pairs_per_update": 2,
        "accumulation": 1,
        "learning_rate": 1e-3,
        "steps": 5,
        "save_every": 2,
        "seed": 5,
    }
    return build_config({**values, **changes})


class TinyHost:
    """A `training.host.Host` that needs no checkpoint file, no VAE and no text encoder: pictures are latents."""

    architecture, naming, prediction_type = "sd15", "diffusers", "v_prediction"
    device = torch.device("cpu")
    checkpoint_name, checkpoint_hash = "tiny.safetensors", "0123456789"

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        import copy

        self.config = config
        source = tiny_sd15(channels=(32, 32), depths=(1, 1), text_width=WIDTH, heads=2, res_blocks=2)
        self.network = copy.deepcopy(source.unet).to(dtype)
        self.dtype = dtype
        self.alphas_cumprod = scaled_linear_alphas_cumprod()
        self.sigmas = ladder_of(config, self.alphas_cumprod)
        self.denoiser = GuidedDenoiser(self.predict, self.alphas_cumprod, self.prediction_type)
        self.evaluations = 0
        self.decode_batch, self.checkpointing = config.rollout.decode_batch, False
        self.prepared: set[str] = set()

    def predict(self, x_vp: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self.evaluations += len(x_vp)
        output = self.network(x_vp.to(self.dtype), timesteps, conditioning.cross_attention.to(self.dtype)).sample
        return 0.1 * output  # v = 0 is the exact denoiser of a standard normal world; the network perturbs it

    def prepare(self, prompts: Sequence[str]) -> None:
        self.prepared.update(prompts)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        assert self.prepared.issuperset(prompts)
        return Conditioning(torch.stack([torch.randn(5, WIDTH, generator=generator(prompt)) for prompt in prompts]))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return self.conditioning(prompts).cross_attention.mean(1)

    def arguments(self, prompts: Sequence[str]) -> dict:
        negative = Conditioning(torch.zeros(len(prompts), 5, WIDTH))
        return {
            "cond": self.conditioning(prompts),
            "uncond": negative,
            "guidance_scale": self.config.rollout.guidance_scale,
        }

    def rollout(self, prompts, seeds, settings, preference, watch):
        draws = SeededDraws(seeds)
        return sample_spo(
            self.denoiser,
            draws.initial((4, 8, 8)) * self.sigmas[0],
            self.sigmas,
            self.arguments(prompts),
            settings=settings,
            draws=draws,
            alphas_cumprod=self.alphas_cumprod,
            scoring=None
            if preference is None
            else Scoring(preference, prompts, self.decode, watch, self.text_features(prompts)),
            repeat=repeat_conditioning,
        )

    def denoise(self, x, sigma, prompts, step):
        return self.denoiser(x, sigma, **self.arguments(prompts))

    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        self.prepare(prompts)
        return self.rollout(prompts, seeds, RolloutSettings(candidates=1), None, None).x

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].tanh()

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Means of 8 x 8 pixels, and their brightness as the fourth channel."""
        small = torch.nn.functional.avg_pool2d(pictures, 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)

    def set_gradient_checkpointing(self, on: bool) -> None:
        self.checkpointing = on


class MeanOfChannel:
    """Prefers latents whose channel 0 is high: a taste with a known answer. `scale` turns it into log-odds."""

    name, needs_pixels, needs_denoised = "mean-of-channel", False, True

    def __init__(self, scale: float = 20.0, then: Callable[[Tensor], Tensor] = lambda scores: scores) -> None:
        self.scale, self.then = scale, then

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        return self.then(self.scale * candidates.denoised[:, :, 0].mean((2, 3)))


def same_weights(first: Mapping[str, LoraLayer], second: Mapping[str, LoraLayer]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name].down, second[name].down)
        and torch.equal(first[name].up, second[name].up)
        and first[name].alpha == second[name].alpha
        for name in first
    )


def rows_of(config):
    """The rows of a run's metrics, as texts."""
    with (RunFiles.of(config.run.output).metrics).open(newline="") as file:
        return list(csv.DictReader(file))


def weights_of(path):
    """The layers of a LoRA file."""
    return read_lora(path).layers
