"""The demo's preference model: a small step-aware network on the predicted clean latent. No decoder, no text.

It was fitted (spo/demo/make_preference.py) by the paper's recipe to pairs that a rule labelled: the rule of taste
in spo/demo/rule.py, which itself is never shown to training and stays the judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spo.algorithm.preference import Candidates
from spo.errors import SpoError

KIND = "latent_cnn"


class LatentCNN(nn.Module):
    """[N, 4, h, w] clean-latent predictions and [N] timesteps -> [N] scores.

    Means and deviations of two layers of features, the first of them linear, and the timestep go into a small head.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
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
        told = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        return self.head(torch.cat([*pooled, told], 1))[:, 0]


class DemoTaste:
    """A `PreferenceModel` over a `LatentCNN`."""

    needs_pixels = False

    def __init__(self, network: LatentCNN, name: str = "demo") -> None:
        self.network, self.name = network.eval().requires_grad_(False), name

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32; see `PreferenceModel`. The prompts do not matter."""
        flat = candidates.denoised.flatten(0, 1).float()
        timesteps = torch.full((len(flat),), candidates.timestep, device=flat.device)
        return self.network(flat, timesteps).unflatten(0, candidates.denoised.shape[:2])


def save_demo_taste(network: LatentCNN, path: Path, facts: dict[str, str]) -> None:
    """Write the network (float16) with `facts` as metadata."""
    from safetensors.torch import save_file

    tensors = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, {"spo_preference": KIND, "width": str(network.width), **facts})


def load_demo_taste(path: Path, device: torch.device | str = "cpu") -> DemoTaste:
    """Read what `save_demo_taste` wrote, in float32. Raises SpoError for another kind of file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts = file.metadata() or {}
        if facts.get("spo_preference") != KIND:
            raise SpoError(f'"{path}" is not a preference model of the demo\'s kind.')
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    network = LatentCNN(int(facts["width"]))
    network.load_state_dict(tensors)
    return DemoTaste(network.to(device))
