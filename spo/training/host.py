"""What training, voting and comparing need of the world around a checkpoint: one protocol for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from spo.algorithm.diffusion import checked_ladder, sigma_ladder
from spo.algorithm.preference import PreferenceModel
from spo.algorithm.rollout import PoolVerdict, Rollout, RolloutSettings
from spo.config import Config
from spo.errors import SpoError


class Host(Protocol):
    """A checkpoint that can be sampled and trained. `headless.host` and `webui.host` each have one.

    architecture     "sd15" or "sdxl"; naming: "diffusers" or "ldm", how `network`'s modules are called
    prediction_type  "epsilon" or "v_prediction"
    network          the UNet, frozen, into which the adapter goes
    device, dtype    where it computes, and in what precision (its weights may be stored in another)
    checkpoint_name, checkpoint_hash  for files that are made with it; the hash may be ""
    alphas_cumprod   [1000] the network's training schedule
    decode_batch     latents decoded at a time; lowered when memory runs out
    """

    architecture: str
    naming: str
    prediction_type: str
    network: nn.Module
    device: torch.device
    dtype: torch.dtype
    checkpoint_name: str
    decode_batch: int

    @property
    def checkpoint_hash(self) -> str: ...

    @property
    def alphas_cumprod(self) -> Tensor: ...

    def prepare(self, prompts: Sequence[str]) -> None:
        """Make these prompts known to the methods below, which take no others. May be called again, with others."""
        ...

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """[N, D] float32 on the CPU: the mean over the first 77 places of what the network is told of each prompt.

        It is what preference models that read the prompt look at (`Candidates.text`). D is 768 in SD1.5, 2048 in SDXL.
        """
        ...

    def rollout(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RolloutSettings,
        preference: PreferenceModel | None,
        watch: Callable[[PoolVerdict], None] | None,
    ) -> Rollout:
        """Sample one picture for each prompt through `sample_spo`, without gradient; candidates 1: plain sampling."""
        ...

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[str], step: Tensor) -> Tensor:
        """[N, C, H, W] float32 denoised latents (guidance as configured), with gradient where it is enabled.

        x [N, C, H, W] VE; sigma [N]; prompts: N of those prepared; step [N] of the ladder, for prompts that change
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[N, C, h, w] latents -> [N, 3, 8 h, 8 w] pictures about [-1, 1], float32; `to_picture` clamps, scorers do."""
        ...

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """[N, 3, 8 h, 8 w] pictures in [-1, 1] -> [N, C, h, w] latents: the mean, or by `noise` a draw."""
        ...

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Less memory in training for more time; switched on when memory runs out and nothing else helps."""
        ...


def rollout_settings(config: Config) -> RolloutSettings:
    """The part of the configuration that `sample_spo` needs."""
    names = [item.name for item in dataclasses.fields(RolloutSettings)]
    return RolloutSettings(**{name: getattr(config.rollout, name) for name in names})


def ladder_of(config: Config, alphas_cumprod: Tensor) -> Tensor:
    """[steps + 1] the noise levels that `sigmas` and `sampling_steps` name. SpoError when they make no ladder."""
    text = config.rollout.sigmas
    if not any(character.isdigit() for character in text):
        return sigma_ladder(text, config.rollout.sampling_steps, alphas_cumprod)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise SpoError(f'sigmas is "{text}"; give a name or falling numbers with commas between them.') from None
    return checked_ladder(numbers)
