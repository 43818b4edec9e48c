"""The taste head: a small step-aware ensemble on the noisy latent, fitted to the user's own votes.

It reads what the sampler has in its hands, the noisy latent and its noise level: no decoded picture, no clean
prediction, no second network. So a rollout needs no VAE, and evaluates the network only for the candidate that goes on.
What it reads was chosen by measurement (docs/taste.md). The idea to score noisy latents is LPO's (Zhang et al. 2025,
arXiv 2502.01051), which reads them with the diffusion network itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo.algorithm.diffusion import network_input
from spo.algorithm.preference import Candidates
from spo.checkpoint.tensor_file import TensorFile, read_tensors
from spo.errors import SpoError
from spo.files import write_whole
from spo.preference.placement import Placement, without_autocast
from spo.rng import stable_seed

KIND = "taste"
LATENT_CHANNELS = 4
_FREQUENCIES = 8


@dataclass(frozen=True)
class TasteFacts:
    """What a taste head's file says of itself.

    architecture, checkpoint_name, checkpoint_hash  the checkpoint whose pictures were voted on
    votes              that prefer a side or call a tie, which it was fitted to
    held_out_accuracy  share of held-out votes whose order it gets right, at its least noisy level, 0 ... 1
    accuracy_by_timestep  the same by timestep, as JSON {"1": 0.9, ...}
    """

    name: str = "taste"
    architecture: str = "sd15"
    checkpoint_name: str = ""
    checkpoint_hash: str = ""
    votes: int = 0
    held_out_accuracy: float = 0.0
    accuracy_by_timestep: str = "{}"


class TasteNetwork(nn.Module):
    """One member: [N, 4, h, w] noisy latents as the UNet sees them (unit variance), [N] sigmas -> [N] scores.

    Two convolutions, each modulated by the noise level (FiLM, Perez et al. 2018); the means and deviations of their
    features over the picture, and the noise level, go into a small head. Features of larger latents are halved in
    between, while longer than 16. It knows sigma, not the timestep, so that the checkpoint's schedule does not matter.

    stride  above 1: the first convolution reads squares of that side, one beside the other, and the second works on
            features halved while longer than 8: what a head for large latents costs is then reading them (`stride_for`)
    """

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.width, self.stride = width, stride
        self.level = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, 4 * width))
        side, padding = (3, 1) if stride == 1 else (stride, 0)
        self.enter = nn.Conv2d(LATENT_CHANNELS, width, side, stride, padding)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(7 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))
        self.told = nn.Linear(2 * _FREQUENCIES, width)  # of the noise level; its name stands in saved files

    def forward(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return self.after_first(self.enter(latents), sigma)

    def noised_first(self, squares: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """[N, places, width] what `enter` makes of latents noised to [N] sigmas, where squares do not overlap.

        squares  [N, places, 4 * stride^2] of the clean latents (`squares_of`)
        noise    [N, places, width] standard normal

        `enter` is linear, so what it makes of white noise is normal, too, with the covariance W W^T, and independent
        from square to square: it is drawn there, of as many numbers as there are features, not pixels.
        """
        weight = self.enter.weight.flatten(1)
        covariance = weight @ weight.T
        least = 1e-6 * covariance.diagonal().mean() * torch.eye(self.width, device=weight.device)
        root = torch.linalg.cholesky(covariance + least)
        level = sigma[:, None, None]
        return (squares @ weight.T + level * (noise @ root.T)) * (1 + level**2).rsqrt() + self.enter.bias

    def after_first(self, first: Tensor, sigma: Tensor) -> Tensor:
        """[N] scores of [N, width, h, w] first features."""
        levels = _embedded(sigma)
        scale, shift, inner_scale, inner_shift = self.level(levels)[..., None, None].chunk(4, 1)
        lit = nn.functional.silu(first * (1 + scale) + shift)
        smaller = lit
        longest = 16 if self.stride == 1 else 8
        while min(smaller.shape[-2:]) > longest:
            smaller = nn.functional.avg_pool2d(smaller, 2)
        second = nn.functional.silu(self.inner(smaller) * (1 + inner_scale) + inner_shift)
        pooled = [value for x in (first, lit, second) for value in (x.mean((2, 3)), x.flatten(2).std(2))]
        return self.head(torch.cat([*pooled, self.told(levels)], 1))[:, 0]


def stride_for(latents: Tensor) -> int:
    """The side of the squares that a head for [..., h, w] latents reads: 1 where they are small, 8 at SDXL's size."""
    side = min(latents.shape[-2:])
    return 1 if side < 32 else 4 if side < 128 else 8


def squares_of(latents: Tensor, stride: int) -> Tensor:
    """[..., 4, h, w] -> [..., places, 4 * stride^2], row by row; what is over at the right and below is left out."""
    flat = nn.functional.unfold(latents.flatten(0, -4), stride, stride=stride).transpose(1, 2)
    return flat.unflatten(0, latents.shape[:-3]).contiguous()


def _embedded(sigma: Tensor) -> Tensor:
    """[N] -> [N, 2 * _FREQUENCIES] sines and cosines of log sigma, which runs from about -3.5 to 2.7."""
    logs = sigma.float().clamp(min=0.01).log()
    angles = logs[:, None] * torch.linspace(0.2, 2.0, _FREQUENCIES, device=sigma.device)
    return torch.cat([angles.cos(), angles.sin()], 1)


class TasteHead:
    """The `PreferenceModel` over an ensemble of members, whose mean is the score."""

    needs_pixels = False
    needs_denoised = False  # `sample_spo` scores candidates before the network has seen them

    def __init__(self, members: Sequence[TasteNetwork], facts: TasteFacts) -> None:
        self.members = nn.ModuleList(members).eval().requires_grad_(False)
        self.facts, self.name = facts, facts.name

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32 log-odds; see `PreferenceModel`. The prompts do not matter."""
        flat = candidates.x.flatten(0, 1)
        scores = self.member_scores(flat, candidates.sigma).mean(0)
        return scores.unflatten(0, candidates.x.shape[:2])

    @torch.no_grad()
    def member_scores(self, x: Tensor, sigma: float) -> Tensor:
        """[members, N] float32 scores of [N, 4, h, w] VE latents at one noise level, on the latents' device."""
        sigmas = torch.full((len(x),), float(sigma), device=x.device)
        seen = network_input(x.float(), sigmas)
        with without_autocast(x.device):
            return torch.stack([member(seen, sigmas) for member in self.members.to(x.device)])


def choose_pair(head: TasteHead | None, candidates: Sequence[Tensor], seed: int = 0) -> int:
    """Which of several pairs or pools teaches most: the one that the ensemble's members disagree about most.

    head        None, or no votes yet: one at random
    candidates  their clean latents, [K, 4, h, w] each, as in `VotePool`

    The disagreement is the deviation over members of the probability that a picture is the best one, its mean over the
    pictures (query by committee, Seung et al. 1992). Raises ValueError when there are no candidates.
    """
    if not candidates:
        raise ValueError("nothing to choose from")
    if head is None:
        return stable_seed(seed, "pair") % len(candidates)
    spread = []
    for latents in candidates:
        scores = head.member_scores(latents.float(), sigma=0.0)
        spread.append(float(scores.softmax(1).std(0).mean()))
    return max(range(len(spread)), key=spread.__getitem__)


# ---------------------------------------------------------------------------------------------- files


def save_taste(head: TasteHead, path: Path) -> None:
    """Write a head as one safetensors file with its facts as metadata, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: value.cpu().float().contiguous() for name, value in head.members.state_dict().items()}
    metadata = {name: str(value) for name, value in asdict(head.facts).items()}
    first: Any = head.members[0]
    metadata |= {"spo_preference": KIND, "width": str(first.width), "members": str(len(head.members))}
    if first.stride > 1:
        metadata["stride"] = str(first.stride)
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def is_taste(file: TensorFile) -> bool:
    """Whether `save_taste` wrote the file."""
    return file.metadata.get("spo_preference") == KIND


def read_taste(file: TensorFile, name: str, place: Placement) -> TasteHead:
    """The head in a file that `save_taste` wrote, in float32. SpoError when it is damaged."""
    try:
        count, width = int(file.metadata["members"]), int(file.metadata["width"])
        stride = int(file.metadata.get("stride", 1))
        facts = {field.name: file.metadata[field.name] for field in fields(TasteFacts)}
        votes, accuracy = int(facts.pop("votes")), float(facts.pop("held_out_accuracy"))
        json.loads(facts["accuracy_by_timestep"])
        if not 1 <= count <= 64 or not 1 <= width <= 1024 or not 1 <= stride <= 64:
            raise ValueError(f"{count} members of width {width} and stride {stride}")
        members = [TasteNetwork(width, stride) for _ in range(count)]
        tensors = read_tensors(file, file.tensors)
        nn.ModuleList(members).load_state_dict({key: value.float() for key, value in tensors.items()})
    except (KeyError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise SpoError(f'"{file.path.name}" is a damaged taste head ({first}); fit it again from the votes.') from error
    head = TasteHead(members, TasteFacts(**{**facts, "name": name}, votes=votes, held_out_accuracy=accuracy))
    head.members.to(place.device)
    return head


def describe(facts: TasteFacts) -> str:
    """A few lines for whoever asks what the file is."""
    levels = json.loads(facts.accuracy_by_timestep)
    right = ", ".join(f"{share:.0%} at timestep {timestep}" for timestep, share in levels.items())
    return "\n".join(
        [
            f"{facts.name}: a taste head for {facts.architecture}, fitted to {facts.votes} votes",
            f"voted on    {facts.checkpoint_name or 'unknown'} {facts.checkpoint_hash}".rstrip(),
            f"right       about held-out votes: {right}",
        ]
    )
