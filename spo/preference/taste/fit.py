"""Fit a taste head to votes: Bradley-Terry with ties on noisy latents, with fresh noise at every step.

The noise of a pair's two pictures is independent, as that of a pool's candidates is. (The paper adds the same noise to
both; measured on the demo checkpoint, heads fitted so are 1 to 11 points worse on candidates. docs/taste.md)

Large latents (32 and more on the shorter side) are read by a strided first layer, and their noise is drawn after it
(`TasteNetwork.noised_first`), out of a store: a window on numbers drawn once, which moves at random from update to
update. At full size drawing noise for each pixel took longer than all else.

Where the votes carry their prompts' text features, a second ensemble reads them, too, and is taken where it is surely
better on the votes that its members left out. Most votes do not depend on the prompt: the second ensemble is given up
after two members that are no better than the first two of the first.

Votes are dealt into as many folds as the ensemble has members, and each member leaves one fold out. So every vote is
held out from one member, the accuracy is that of members on votes they have not seen, and no vote is wasted.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo.algorithm.diffusion import network_input, scaled_linear_alphas_cumprod, training_sigmas
from spo.algorithm.preference import Candidates, PreferenceModel
from spo.errors import SpoError
from spo.preference.taste.head import (
    PromptReader,
    TasteFacts,
    TasteHead,
    TasteNetwork,
    prompt_reader,
    squares_of,
    stride_for,
)
from spo.preference.taste.votes import Vote, VoteFolder
from spo.report.tables import table
from spo.report.win_rate import wilson_interval
from spo.rng import generator, permutation, stable_seed

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class FitSettings:
    """How a taste head is fitted; chosen by measurement (docs/taste.md).

    members        of the ensemble, each leaves one fold of the votes out
    width          channels of a member's two convolutions
    updates        of the optimizer (AdamW, one cycle up and down to `learning_rate`); pairs_per_update
    timestep_max   noise levels are drawn uniformly over timesteps 0 ... timestep_max
    """

    members: int = 5
    width: int = 32
    updates: int = 300
    pairs_per_update: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.2
    timestep_max: int = 900
    seed: int = 0


def davidson_loss(difference: Tensor, answer: Tensor, log_tie: Tensor) -> Tensor:
    """[N] negative log likelihood of answers under Bradley-Terry with ties (Davidson 1970, eq. 2.3).

    P(left), P(tie), P(right) = softmax(d / 2, log nu, -d / 2), so that without ties P(left) = sigmoid(d).

    difference  [N] score of the left picture less that of the right one
    answer      [N] 1: left is preferred, 0.5: a tie, 0: right; log_tie  log nu, 0-dim
    """
    logits = torch.stack([-difference / 2, log_tie.expand_as(difference), difference / 2], 1)
    return nn.functional.cross_entropy(logits, (2 * answer).round().long(), reduction="none")


def fold_of(count: int, folds: int, seed: int) -> Tensor:
    """[count] int64: the fold of each vote; folds differ by one vote at most."""
    return torch.tensor(permutation(count, seed, "folds")) % folds


def fit_member(
    latents: Tensor,
    answers: Tensor,
    settings: FitSettings,
    member: int,
    progress: Callable[[float], None] | None = None,
    device: torch.device = _CPU,
    codes: Tensor | None = None,
) -> TasteNetwork:
    """One member fitted to [N, 2, 4, h, w] clean latents and [N] answers (1 left, 0.5 tie, 0 right).

    progress  called with the share of updates done
    device    where it computes; random numbers and the result are the CPU's
    codes     [N, codes] of the prompts (`PromptReader`), for a member that reads them
    """
    position = (settings.seed, "taste", member)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(*position))
        network = TasteNetwork(settings.width, stride_for(latents), 0 if codes is None else codes.shape[1]).to(device)
    log_tie = nn.Parameter(torch.tensor(-1.0, device=device))
    groups: list[dict[str, Any]] = [
        {"params": list(network.parameters())},
        {"params": [log_tie], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.updates)
    sigmas = training_sigmas(scaled_linear_alphas_cumprod())[: settings.timestep_max + 1].float()
    draw = generator(*position, "draws")
    squares, noises = latents, None
    if network.stride > 1:
        squares = squares_of(latents, network.stride)
        places = squares.shape[2]
        noises = _Noises(2 * min(settings.pairs_per_update, len(latents)) * places * settings.width, draw, device)
    order: list[int] = []
    for update in range(settings.updates):
        if progress is not None:
            progress(update / settings.updates)
        if len(order) < min(settings.pairs_per_update, len(latents)):
            order += torch.randperm(len(latents), generator=draw).tolist()
        rows = torch.tensor(order[: settings.pairs_per_update])
        order = order[settings.pairs_per_update :]
        sigma = sigmas[torch.randint(len(sigmas), (len(rows),), generator=draw)]
        clean = squares[rows]
        sigma_of_both = sigma.repeat_interleave(2).to(device)  # one level a pair, but independent noise: see above
        codes_of_both = None if codes is None else codes[rows].repeat_interleave(2, 0).to(device)
        if noises is None:
            noise = torch.randn(clean.shape, generator=draw)
            noisy = (clean + sigma[:, None, None, None, None] * noise).flatten(0, 1).to(device)
            both = network(network_input(noisy, sigma_of_both), sigma_of_both, codes_of_both)
        else:
            flat = clean.flatten(0, 1).to(device)
            first = network.noised_first(flat, sigma_of_both, noises.of((*flat.shape[:2], network.width)))
            rows_and_columns = [side // network.stride for side in latents.shape[-2:]]
            squared = first.transpose(1, 2).unflatten(2, rows_and_columns)
            both = network.after_first(squared, sigma_of_both, codes_of_both)
        scores = both.unflatten(0, (-1, 2))
        loss = davidson_loss(scores[:, 0] - scores[:, 1], answers[rows].to(device), log_tie).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return network.cpu().eval().requires_grad_(False)


class _Noises:
    """Standard normal numbers for up to `count` values at a time: a window on twice as many, elsewhere each time."""

    def __init__(self, count: int, draw: torch.Generator, device: torch.device) -> None:
        self.count, self.draw = count, draw
        self.store = torch.randn(2 * count, generator=draw).to(device)

    def of(self, shape: tuple[int, ...]) -> Tensor:
        """On the device; not to be changed."""
        first = int(torch.randint(self.count, (), generator=self.draw))
        return self.store[first : first + math.prod(shape)].view(shape)


# ---------------------------------------------------------------------------------------------- fitting and judging

SHOWN_TIMESTEPS = (1, 201, 401, 601)
LEAST_VOTES = 40
LEAST_PROMPTS = 8  # for what is said of prompts to hold for others
_JUDGING_NOISES = 4
_COMPARED_AT = (1, 201)  # timesteps at which heads with and without the prompt are compared
_TRIED = 2  # members after which reading the prompt is given up, if it does not help
_LEAST_GAIN = 0.01  # of held-out accuracy by which it must help, and by two standard errors of it


@dataclass(frozen=True)
class VoteSet:
    """Votes as tensors, those that were skipped left out.

    latents  [N, 2, 4, h, w] float32 clean latents, left and right
    answers  [N] 1: left is preferred, 0.5: a tie, 0: right
    ids      N ids of the votes
    architecture, checkpoint_name, checkpoint_hash  of most of them
    left_out  votes on pictures of another architecture or size than most, whose latents do not go together
    groups    N numbers from 0 in the order they appear: votes of one pool, which share pictures, are held out together;
              (): each by itself
    texts     [N, D] float32 features of their prompts (`Host.text_features`); None where votes carry none
    """

    latents: Tensor
    answers: Tensor
    ids: tuple[str, ...]
    architecture: str
    checkpoint_name: str
    checkpoint_hash: str
    left_out: int = 0
    groups: tuple[int, ...] = ()
    texts: Tensor | None = None


@dataclass(frozen=True)
class HeldOutAccuracy:
    """Share of votes that prefer a side whose order is right, 0 ... 1, with its 95 % interval.

    timestep  of the noise that was added; None where none was (another scorer on the finished pictures)
    """

    scorer: str
    timestep: int | None
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class FitReport:
    """What came of fitting: votes that prefer a side, ties, votes left out; accuracies of the head, then of others."""

    preferring: int
    ties: int
    left_out: int
    seconds: float
    accuracies: tuple[HeldOutAccuracy, ...]
    reads_prompt: bool = False

    def text(self) -> str:
        """A table with one line for each scorer and noise level."""
        rows = [
            [
                entry.scorer,
                "finished picture" if entry.timestep is None else f"timestep {entry.timestep}",
                f"{entry.share:.0%} ({entry.low:.0%} to {entry.high:.0%})",
            ]
            for entry in self.accuracies
        ]
        made = table(rows, ["scorer", "at", "right about held-out votes (95 %)"])
        beside = f", {self.left_out} of another size or architecture left out" if self.left_out else ""
        reading = " It reads the prompt, which helps with votes that it has not seen." if self.reads_prompt else ""
        return f"{self.preferring} votes prefer a side, {self.ties} are ties{beside}.{reading}\n\n{made}"


@dataclass(frozen=True)
class FittedTaste:
    """A head and how good it is."""

    head: TasteHead
    report: FitReport


def read_vote_set(folder: VoteFolder) -> VoteSet:
    """The votes of a folder as tensors. Raises SpoError when there are none to learn from, or latents are missing."""
    votes = [vote for vote in folder.votes() if vote.answer != "skip"]
    if not votes:
        raise SpoError(f'"{folder.path}" holds no vote to learn from: vote left, right or tie on some pairs first.')
    pairs = [folder.latents(vote.id) for vote in votes]
    texts = [folder.text(vote.id) for vote in votes]
    kinds = [(vote.architecture, tuple(latents.shape)) for vote, latents in zip(votes, pairs, strict=True)]
    kind = Counter(kinds).most_common(1)[0][0]
    rows = [n for n in range(len(votes)) if kinds[n] == kind]
    name, digest = Counter((votes[n].checkpoint_name, votes[n].checkpoint_hash) for n in rows).most_common(1)[0][0]
    share = {"left": 1.0, "tie": 0.5, "right": 0.0}
    return VoteSet(
        torch.stack([pairs[n] for n in rows]),
        torch.tensor([share[votes[n].answer] for n in rows]),
        tuple(votes[n].id for n in rows),
        kind[0],
        name,
        digest,
        len(votes) - len(rows),
        _groups([votes[n] for n in rows]),
        _texts([texts[n] for n in rows]),
    )


def _texts(texts: Sequence[Tensor | None]) -> Tensor | None:
    """[N, D]; None where less than half of the votes carry the most usual width. Others count as the mean of those."""
    widths = Counter(len(text) for text in texts if text is not None)
    if not widths or 2 * widths.most_common(1)[0][1] < len(texts):
        return None
    width = widths.most_common(1)[0][0]
    known = [text for text in texts if text is not None and len(text) == width]
    mean = torch.stack(known).mean(0)
    return torch.stack([text if text is not None and len(text) == width else mean for text in texts])


def _groups(votes: Sequence[Vote]) -> tuple[int, ...]:
    """The group of each vote: those of one prompt that share a seed, directly or by way of others."""
    groups: list[int] = []
    known: dict[tuple[str, int], int] = {}
    for number, vote in enumerate(votes):
        seeds = {(vote.prompt, vote.seed_left), (vote.prompt, vote.seed_right)}
        if vote.from_step < 0 and vote.seed_left == vote.seed_right:
            seeds = {(vote.id, 0)}  # the user's own pictures have no seeds
        joined = {known[seed] for seed in seeds if seed in known}
        group = min(joined, default=number)
        groups = [group if one in joined else one for one in groups] + [group]
        known = {seed: group if one in joined else one for seed, one in known.items()} | dict.fromkeys(seeds, group)
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return tuple(order[group] for group in groups)


def fit_taste(
    votes: VoteSet,
    settings: FitSettings | None = None,
    *,
    name: str = "taste",
    others: Sequence[HeldOutAccuracy] = (),
    progress: Callable[[float], None] | None = None,
    device: torch.device = _CPU,
) -> FittedTaste:
    """Fit the ensemble, and measure each member on the fold it left out, by noise level.

    others    further scorers' accuracies, for the report (see `accuracy_of`)
    progress  called with the share that is done, 0 ... 1; may raise to stop
    device    where members are fitted; the head is on the CPU

    Raises SpoError when there are too few votes that prefer a side, or when the head does not order held-out votes
    better than chance: then the votes contradict each other, or follow nothing that it can see.
    """
    settings = settings or FitSettings()
    began = time.monotonic()
    prefers = votes.answers != 0.5
    count = int(prefers.sum())
    if count < LEAST_VOTES:
        raise SpoError(
            f"{count} votes prefer a side; at least {LEAST_VOTES} are needed, and 200 or more make a dependable taste."
        )
    groups = votes.groups or tuple(range(len(votes.answers)))
    folds = fold_of(max(groups) + 1, settings.members, settings.seed)[list(groups)]
    parts = 1 if votes.texts is None else 2
    members = fit_members(votes, settings, folds, partial(_part_done, progress, 0, parts), device)
    reader, done = None, partial(_part_done, progress, 1, parts)
    reading = _reading_prompts(votes, settings, folds, members, done, device)
    plain: tuple[HeldOutAccuracy, ...] = ()
    if reading is not None:
        plain = (_held_out(members, votes, folds, SHOWN_TIMESTEPS[0], settings, scorer="without the prompt"),)
        members, reader = reading
    accuracies = [_held_out(members, votes, folds, timestep, settings, reader) for timestep in SHOWN_TIMESTEPS]
    least_noisy = accuracies[0]
    if least_noisy.low <= 0.5:
        raise SpoError(
            f"The votes teach nothing: on held-out ones the head is right {least_noisy.share:.0%} of the time (95 % "
            f"interval {least_noisy.low:.0%} to {least_noisy.high:.0%}), no better than chance; vote on more pairs, "
            f"by one taste, and skip those without a difference ({count} votes prefer a side)."
        )
    facts = TasteFacts(
        name, votes.architecture, votes.checkpoint_name, votes.checkpoint_hash, len(votes.answers), least_noisy.share,
        json.dumps({str(entry.timestep): round(entry.share, 4) for entry in accuracies}),
    )  # fmt: skip
    first = _accuracy("always the first", None, votes.answers[prefers])
    report = FitReport(
        count, len(votes.answers) - count, votes.left_out, time.monotonic() - began,
        (*accuracies, *plain, first, *others), reader is not None,
    )  # fmt: skip
    return FittedTaste(TasteHead(members, facts, reader), report)


def _part_done(progress: Callable[[float], None] | None, part: int, parts: int, share: float) -> None:
    if progress is not None:
        progress((part + share) / parts)


def fit_members(
    votes: VoteSet,
    settings: FitSettings,
    folds: Tensor,
    progress: Callable[[float], None],
    device: torch.device = _CPU,
    codes: Tensor | None = None,
    keep_on: Callable[[list[TasteNetwork]], bool] = lambda members: True,
) -> list[TasteNetwork]:
    """The ensemble, each member fitted to all votes but those of its fold; fewer where `keep_on` of those there are
    says no. Other arguments as for `fit_member`; progress: with the share of the ensemble done."""
    members: list[TasteNetwork] = []
    for member in range(settings.members):
        rest = folds != member

        def member_progress(share: float, member: int = member) -> None:
            progress((member + share) / settings.members)

        of_rest = None if codes is None else codes[rest]
        members.append(
            fit_member(votes.latents[rest], votes.answers[rest], settings, member, member_progress, device, of_rest)
        )
        if not keep_on(members):
            break
    return members


def _reading_prompts(
    votes: VoteSet,
    settings: FitSettings,
    folds: Tensor,
    plain: Sequence[TasteNetwork],
    progress: Callable[[float], None],
    device: torch.device,
) -> tuple[list[TasteNetwork], PromptReader] | None:
    """An ensemble that reads prompts, if that is surely better on held-out votes than `plain`, which does not."""
    if votes.texts is None or len(votes.texts.unique(dim=0)) < LEAST_PROMPTS:
        return None
    reader = prompt_reader(votes.texts)
    without = _rightness_of(plain, votes, folds, settings)

    def gain(members: Sequence[TasteNetwork]) -> Tensor:
        """Of each vote that prefers a side and that one of the members has not seen."""
        unseen = (folds < len(members)) & (votes.answers != 0.5)
        return (_rightness_of(members, votes, folds, settings, reader) - without)[unseen]

    def keep_on(members: list[TasteNetwork]) -> bool:
        return len(members) != _TRIED or float(gain(members).mean()) > 0

    members = fit_members(votes, settings, folds, progress, device, reader(votes.texts), keep_on)
    if len(members) < settings.members:
        return None
    gains = gain(members)
    surely = float(gains.mean()) > max(_LEAST_GAIN, 2 * float(gains.std()) / math.sqrt(len(gains)))
    return (members, reader) if surely else None


def accuracy_of(preference: PreferenceModel, folder: VoteFolder, votes: VoteSet) -> HeldOutAccuracy:
    """How often another scorer is right about the finished pictures of the votes, at timestep 0; no decoder needed."""
    prompts = {vote.id: vote.prompt for vote in folder.votes()}
    right = []
    sigma = float(training_sigmas(scaled_linear_alphas_cumprod())[0])
    for n in (votes.answers != 0.5).nonzero()[:, 0].tolist():
        pixels = _pixels_of(folder.pictures(votes.ids[n]))
        pool = votes.latents[n][:, None]
        text = None if votes.texts is None else votes.texts[n : n + 1]
        candidates = Candidates(pool, sigma, 0.0, pool, partial(_stored, pixels), text)
        scores = preference.score(candidates, [prompts[votes.ids[n]]])[:, 0]
        right.append(_rightness(scores[0] - scores[1], votes.answers[n]))
    return _accuracy(preference.name, None, torch.stack(right))


def _stored(pixels: Tensor, latents: Tensor) -> Tensor:
    """Stands in for a decoder: the pictures are there already."""
    return pixels


def _pixels_of(pictures: Sequence[Path]) -> Tensor:
    """[2, 3, height, width] in [-1, 1] of two PNG files."""
    import numpy as np
    from PIL import Image

    opened = [np.array(Image.open(path).convert("RGB")) for path in pictures]
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1 for picture in opened])


def _held_out(
    members: Sequence[TasteNetwork],
    votes: VoteSet,
    folds: Tensor,
    timestep: int,
    settings: FitSettings,
    reader: PromptReader | None = None,
    scorer: str = "taste head",
) -> HeldOutAccuracy:
    """How often each member is right about the fold it left out."""
    differences = _differences(members, votes, folds, timestep, settings, reader)
    right = _rightness(differences, votes.answers).mean(0)
    return _accuracy(scorer, timestep, right[votes.answers != 0.5])


def _rightness_of(
    members: Sequence[TasteNetwork],
    votes: VoteSet,
    folds: Tensor,
    settings: FitSettings,
    reader: PromptReader | None = None,
) -> Tensor:
    """[N] how often the member that left a vote out is right about it; the mean over `_COMPARED_AT` and noises."""
    differences = [_differences(members, votes, folds, timestep, settings, reader) for timestep in _COMPARED_AT]
    return _rightness(torch.cat(differences), votes.answers).mean(0)


@torch.no_grad()
def _differences(
    members: Sequence[TasteNetwork],
    votes: VoteSet,
    folds: Tensor,
    timestep: int,
    settings: FitSettings,
    reader: PromptReader | None,
) -> Tensor:
    """[noises, N] score of the left picture less that of the right one by the member that left the vote out, 0 without.

    With independent noise on both pictures, as candidates have it.
    """
    sigma = training_sigmas(scaled_linear_alphas_cumprod())[timestep].float()
    draw = generator(settings.seed, "held out", timestep)
    codes = None if reader is None or votes.texts is None else reader(votes.texts)
    differences = torch.zeros(_JUDGING_NOISES, len(votes.answers))
    for row in differences:
        noisy = votes.latents + sigma * torch.randn(votes.latents.shape, generator=draw)
        for number, member in enumerate(members):
            rows = (folds == number).nonzero()[:, 0]
            both = sigma.expand(2 * len(rows))
            of_both = None if codes is None else codes[rows].repeat_interleave(2, 0)
            scores = member(network_input(noisy[rows].flatten(0, 1), both), both, of_both).unflatten(0, (-1, 2))
            row[rows] = scores[:, 0] - scores[:, 1]
    return differences


def _rightness(difference: Tensor, answer: Tensor) -> Tensor:
    """1 where a difference has the sign of the answer (1 left, 0 right), 0.5 where it is zero, else 0."""
    return (torch.sign(difference) * torch.sign(answer - 0.5)) / 2 + 0.5


def _accuracy(scorer: str, timestep: int | None, right: Tensor) -> HeldOutAccuracy:
    """The mean of [N] shares in 0 ... 1 with Wilson's 95 % interval for N votes."""
    share = float(right.mean())
    return HeldOutAccuracy(scorer, timestep, share, *wilson_interval(share, len(right)))
