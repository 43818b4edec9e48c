"""The taste head: a small step-aware ensemble on the noisy latent, fitted to the user's own votes.

It reads what the sampler has in its hands, the noisy latent and its noise level: no decoded picture, no clean
prediction, no second network. So a rollout needs no VAE, and evaluates the network only for the candidate that goes on.
What it reads was chosen by measurement (docs/taste.md). The idea to score noisy latents is LPO's (Zhang et al. 2025,
arXiv 2502.01051), which reads them with the diffusion network itself.

A taste may depend on the prompt ("warm" for people, "cold" for landscapes). Where the votes say so, the head reads the
prompt, too: the checkpoint's own text feature (`Host.text_features`), brought down to a few numbers by `PromptReader`,
weighs the features of the picture. What it says of the prompt alone cancels between two pictures of it, so it says
nothing of that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

KIND = "taste"
LATENT_CHANNELS = 4
PROMPT_CODES = 16
_PROMPT_RANK = 2
_READER = "prompts."  # before the names of a prompt reader's tensors
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
    codes   above 0: numbers that stand for the prompt (`PromptReader`), by which the last layer's weights change, along
            `_PROMPT_RANK` directions
    """

    def __init__(self, width: int, stride: int = 1, codes: int = 0) -> None:
        super().__init__()
        self.width, self.stride, self.codes = width, stride, codes
        self.level = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, 4 * width))
        side, padding = (3, 1) if stride == 1 else (stride, 0)
        self.enter = nn.Conv2d(LATENT_CHANNELS, width, side, stride, padding)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(7 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))
        self.told = nn.Linear(2 * _FREQUENCIES, width)  # of the noise level; its name stands in saved files
        if codes:
            weights = nn.Linear(_PROMPT_RANK, 2 * width, bias=False)
            nn.init.zeros_(weights.weight)  # at first as if there were no prompt
            self.by_prompt = nn.Sequential(nn.Linear(codes, _PROMPT_RANK, bias=False), weights)

    def forward(self, latents: Tensor, sigma: Tensor, codes: Tensor | None = None) -> Tensor:
        """codes  [N, codes] of the prompts, of a network that reads them."""
        return self.after_first(self.enter(latents), sigma, codes)

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

    def after_first(self, first: Tensor, sigma: Tensor, codes: Tensor | None = None) -> Tensor:
        """[N] scores of [N, width, h, w] first features; codes as in `forward`."""
        levels = _embedded(sigma)
        scale, shift, inner_scale, inner_shift = self.level(levels)[..., None, None].chunk(4, 1)
        lit = nn.functional.silu(first * (1 + scale) + shift)
        smaller = lit
        longest = 16 if self.stride == 1 else 8
        while min(smaller.shape[-2:]) > longest:
            smaller = nn.functional.avg_pool2d(smaller, 2)
        second = nn.functional.silu(self.inner(smaller) * (1 + inner_scale) + inner_shift)
        pooled = [value for x in (first, lit, second) for value in (x.mean((2, 3)), x.flatten(2).std(2))]
        features = torch.cat([*pooled, self.told(levels)], 1)
        if codes is None:
            return self.head(features)[:, 0]
        hidden = self.head[:2](features)
        return self.head[2](hidden)[:, 0] + (hidden * self.by_prompt(codes)).sum(1)


class PromptReader(nn.Module):
    """[N, D] text features of prompts -> [N, codes] numbers: how they differ along the directions in which the prompts
    that were voted on differ most, so that a few hundred votes need not weigh 768 or 2048 numbers.

    mean [D]; directions [codes, D], scaled so that the codes of the prompts voted on have the mean square 1
    """

    mean: Tensor
    directions: Tensor

    def __init__(self, mean: Tensor, directions: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("directions", directions)

    def forward(self, text: Tensor) -> Tensor:
        return (text - self.mean) @ self.directions.T

    @property
    def width(self) -> int:
        """D."""
        return self.mean.shape[0]

    @property
    def codes(self) -> int:
        return self.directions.shape[0]


def prompt_reader(texts: Tensor, codes: int = PROMPT_CODES) -> PromptReader:
    """Reads prompts by the principal directions of [N, D] features of the votes' prompts, each by the root of its
    deviation: halfway between as it is and all alike."""
    distinct = texts.double().unique(dim=0)
    mean = distinct.mean(0)
    _, sizes, directions = torch.linalg.svd(distinct - mean, full_matrices=False)
    count = min(codes, int((sizes > 1e-4 * sizes[0]).sum()))
    scaled = directions[:count] / sizes[:count, None].sqrt()
    length = ((distinct - mean) @ scaled.T).square().mean().sqrt()
    return PromptReader(mean.float(), (scaled / length).float().contiguous())


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

    def __init__(
        self, members: Sequence[TasteNetwork], facts: TasteFacts, prompt_reader: PromptReader | None = None
    ) -> None:
        self.members = nn.ModuleList(members).eval().requires_grad_(False)
        self.prompt_reader = prompt_reader
        self.facts, self.name = facts, facts.name

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32 log-odds; see `PreferenceModel`. The prompts count by `candidates.text`, if at all."""
        flat = candidates.x.flatten(0, 1)
        codes = self.prompt_codes(candidates.text, flat.device)
        if codes is not None:
            codes = codes.repeat(len(candidates.x), 1)
        scores = self.member_scores(flat, candidates.sigma, codes).mean(0)
        return scores.unflatten(0, candidates.x.shape[:2])

    @torch.no_grad()
    def member_scores(self, x: Tensor, sigma: float, codes: Tensor | None = None) -> Tensor:
        """[members, N] float32 scores of [N, 4, h, w] VE latents at one noise level, on the latents' device.

        codes  [N, codes] of their prompts, of a head that reads them (`prompt_codes`)
        """
        sigmas = torch.full((len(x),), float(sigma), device=x.device)
        seen = network_input(x.float(), sigmas)
        with without_autocast(x.device):
            return torch.stack([member(seen, sigmas, codes) for member in self.members.to(x.device)])

    @torch.no_grad()
    def prompt_codes(self, text: Tensor | None, device: torch.device) -> Tensor | None:
        """[N, codes] of [N, D] text features (`Host.text_features`); None of a head that does not read prompts.

        Raises SpoError where the features are missing, or of another width than those of the votes.
        """
        if self.prompt_reader is None:
            return None
        if text is None:
            raise SpoError(
                f'The taste head "{self.name}" reads the prompt, and here nothing is known of it; use it where the '
                "checkpoint is loaded, or fit a head to votes without text."
            )
        if text.shape[-1] != self.prompt_reader.width:
            raise SpoError(
                f'The taste head "{self.name}" reads text features of width {self.prompt_reader.width}, and the '
                f"checkpoint's have {text.shape[-1]}; use it with a checkpoint of the kind that was voted on "
                f"({self.facts.architecture})."
            )
        return self.prompt_reader.to(device)(text.to(device, torch.float32))


# ---------------------------------------------------------------------------------------------- files


def save_taste(head: TasteHead, path: Path) -> None:
    """Write a head as one safetensors file with its facts as metadata, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: value.cpu().float().contiguous() for name, value in tensors_of(head).items()}
    metadata = {name: str(value) for name, value in asdict(head.facts).items()}
    first: Any = head.members[0]
    metadata |= {"spo_preference": KIND, "width": str(first.width), "members": str(len(head.members))}
    if first.stride > 1:
        metadata["stride"] = str(first.stride)
    if head.prompt_reader is not None:
        metadata |= {"prompt_codes": str(first.codes), "text_width": str(head.prompt_reader.width)}
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
        codes = int(file.metadata.get("prompt_codes", 0))
        if not 1 <= count <= 64 or not 1 <= width <= 1024 or not 1 <= stride <= 64 or not 0 <= codes <= 1024:
            raise ValueError(f"{count} members of width {width}, stride {stride} and {codes} codes of the prompt")
        tensors = {key: value.float() for key, value in read_tensors(file, file.tensors).items()}
        members, prompts = networks_of(tensors, count, width, stride, codes)
    except (KeyError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise SpoError(f'"{file.path.name}" is a damaged taste head ({first}); fit it again from the votes.') from error
    facts_of_file = TasteFacts(**{**facts, "name": name}, votes=votes, held_out_accuracy=accuracy)
    head = TasteHead(members, facts_of_file, prompts)
    head.members.to(place.device)
    return head


def tensors_of(head: TasteHead) -> dict[str, Tensor]:
    """All of a head's tensors by name: its members', "0.enter.weight", and its reader's of prompts, "prompts.mean"."""
    tensors = dict(head.members.state_dict())
    if head.prompt_reader is not None:
        tensors |= {f"{_READER}{name}": value for name, value in head.prompt_reader.state_dict().items()}
    return tensors


def networks_of(
    tensors: Mapping[str, Tensor], count: int, width: int, stride: int, codes: int
) -> tuple[list[TasteNetwork], PromptReader | None]:
    """The networks whose `tensors_of` these are. Raises KeyError or RuntimeError for those of others."""
    members = [TasteNetwork(width, stride, codes) for _ in range(count)]
    of_members = {name: value for name, value in tensors.items() if not name.startswith(_READER)}
    nn.ModuleList(members).load_state_dict(of_members)
    if not codes:
        return members, None
    reader = PromptReader(tensors[f"{_READER}mean"], tensors[f"{_READER}directions"])
    if reader.directions.shape != (codes, reader.width):
        raise RuntimeError(f"directions of the shape {tuple(reader.directions.shape)}")
    return members, reader


def describe(head: TasteHead) -> str:
    """A few lines for whoever asks what the file is."""
    facts, reader = head.facts, head.prompt_reader
    levels = json.loads(facts.accuracy_by_timestep)
    right = ", ".join(f"{share:.0%} at timestep {timestep}" for timestep, share in levels.items())
    return "\n".join(
        [
            f"{facts.name}: a taste head for {facts.architecture}, fitted to {facts.votes} votes",
            f"voted on    {facts.checkpoint_name or 'unknown'} {facts.checkpoint_hash}".rstrip(),
            f"right       about held-out votes: {right}",
            *([] if reader is None else [f"reads       the prompt, by text features of width {reader.width}"]),
        ]
    )
