"""Votes of a small world for tests: whoever votes prefers the latent whose channel 0 is higher."""

from __future__ import annotations

import torch

from spo.preference.taste.fit import FitSettings, VoteSet
from spo.preference.taste.votes import VotePair
from spo.rng import generator

QUICK = FitSettings(members=2, width=8, updates=60)


def pair(number: int, prompt: str = "a cat") -> VotePair:
    draw = generator("pair", number)
    latents = torch.randn(2, 4, 8, 8, generator=draw) * 0.3
    latents[:, 0] += torch.randn(2, generator=draw)[:, None, None]
    latents = latents.half().float()
    return VotePair(prompt, latents, latents[:, :3].tanh(), number, number, 4, "sd15", "tiny.safetensors", "0123456789")


def answer(made: VotePair) -> str:
    means = made.latents[:, 0].mean((1, 2))
    return "left" if means[0] > means[1] else "right"


def vote_set(count: int, truth: bool = True) -> VoteSet:
    """Votes that follow the rule, or coins."""
    pairs = [pair(n) for n in range(count)]
    shares = [float(answer(made) == "left") for made in pairs]
    if not truth:
        shares = torch.randint(0, 2, (count,), generator=generator("coins")).float().tolist()
    return VoteSet(
        torch.stack([made.latents for made in pairs]), torch.tensor(shares), tuple(made.id for made in pairs),
        "sd15", "tiny.safetensors", "0123456789",
    )  # fmt: skip
