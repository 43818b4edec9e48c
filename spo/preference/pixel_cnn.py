"""The pixel CNN: a small network on finished pictures. No timestep, no text.

The demo's second judge, "demo-judge", is one: fitted (recipes/demo_checkpoint/make_judge.py) to other pictures of other
subjects than the preference model that the demo trains on, in pixels where that reads latents, so that what fools the
one need not fool the other. It is for judging finished pictures; nothing of ours trains on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spo.algorithm.preference import Candidates


class PixelCNN(nn.Module):
    """A `PreferenceModel`: [N, 3, H, W] pictures in [-1, 1] -> [N] scores. The prompts do not matter.

    Means and deviations of three layers of features, the first of them linear, go into a small head.
    """

    KIND = "pixel_cnn"  # in the metadata of its files
    needs_pixels = True
    needs_denoised = True

    def __init__(self, width: int = 16, name: str = "pixel CNN") -> None:
        super().__init__()
        self.width, self.name = width, name
        self.enter = nn.Conv2d(3, width, 3, padding=1, stride=2)
        self.inner = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.outer = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.head = nn.Sequential(nn.Linear(6 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        first = self.enter(pixels)
        second = self.inner(nn.functional.silu(first))
        third = self.outer(nn.functional.silu(second))
        pooled = [value for x in (first, second, third) for value in (x.mean((2, 3)), x.flatten(2).std(2))]
        return self.head(torch.cat(pooled, 1))[:, 0]

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32; see `PreferenceModel`."""
        pixels = candidates.pixels()
        flat = pixels.flatten(0, 1).to(self.enter.weight.device).float().clamp(-1, 1)
        return self(flat).unflatten(0, pixels.shape[:2]).to(candidates.x.device)
