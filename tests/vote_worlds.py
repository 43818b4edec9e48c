"""Votes of a small world for tests: whoever votes prefers the latent whose channel 0 is higher."""

from __future__ import annotations

from dataclasses import replace

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


def text_of(number: int) -> torch.Tensor:
    """[6] the feature of one of 20 prompts, which says in direction 2 of which of two kinds the prompt is."""
    text = 0.3 * torch.randn(6, generator=generator("text", number % 20))
    text[2] += 1.0 if number % 2 else -1.0
    return text


def vote_set_by_prompt(count: int, flips: bool = True) -> VoteSet:
    """Votes that follow the rule for prompts of one kind, and where it flips its opposite for those of the other."""
    votes = vote_set(count)
    other = torch.arange(count) % 2 == 1
    answers = torch.where(other & flips, 1 - votes.answers, votes.answers)
    return replace(votes, answers=answers, texts=torch.stack([text_of(n) for n in range(count)]))


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
