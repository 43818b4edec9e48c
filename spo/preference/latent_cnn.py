"""The latent CNN: a small step-aware network on the predicted clean latent. No decoder, no text.

The demo's preference model is one. It was fitted (recipes/demo_checkpoint/make_preference.py) by the paper's recipe to
pairs that a rule labelled: the rule in spo/demo/rule.py, which itself is never shown to training and stays the judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spo.algorithm.preference import Candidates


class LatentCNN(nn.Module):
    """A `PreferenceModel`: [N, 4, h, w] clean-latent predictions and [N] timesteps -> [N] scores. The prompts do not
    matter.

    Means and deviations of two layers of features, the first of them linear, and the timestep go into a small head.
    """

    KIND = "latent_cnn"  # in the metadata of its files
    needs_pixels = False
    needs_denoised = True

    def __init__(self, width: int = 32, name: str = "latent CNN") -> None:
        super().__init__()
        self.width, self.name = width, name
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.head = nn.Sequential(nn.Linear(5 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=latents.device) * (-math.log(10_000) / half))
        angles = timesteps.float()[:, None] * frequencies
        first = self.enter(latents)
        second = self.inner(nn.functional.silu(first))
        pooled = [value for x in (first, second) for value in (x.mean((2, 3)), x.flatten(2).std(2))]
        time = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        return self.head(torch.cat([*pooled, time], 1))[:, 0]

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32; see `PreferenceModel`."""
        denoised = candidates.prediction()
        flat = denoised.flatten(0, 1).float()
        timesteps = torch.full((len(flat),), candidates.timestep, device=flat.device)
        return self(flat, timesteps).unflatten(0, denoised.shape[:2])
