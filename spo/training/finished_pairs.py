"""Pairs of finished pictures for Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908), and their noised form.

Where they come from, by the setting `pairs`:

    a folder of labelled pairs, or parquet files   see `preference.clip.pair_data`; pictures are encoded by the VAE
    a folder of votes                              see `preference.taste.votes`; latents as they are
    none                                           made from the checkpoint, two pictures of a prompt, and labelled by
                                                   the preference model at timestep 0, kept above the threshold

Ties teach nothing and are left out. Latents are made once, before the first update, and lie in the run's folder: a run
that goes on has the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spo.algorithm.diffusion import training_sigmas
from spo.algorithm.pairs import Pairs, select_pairs
from spo.algorithm.preference import Candidates, PreferenceModel
from spo.algorithm.rollout import RolloutSettings
from spo.config import Config
from spo.errors import SpoError
from spo.files import write_whole
from spo.preference.clip.pair_data import PairSource, open_pairs, picture_tensor
from spo.preference.taste.votes import LINES, VoteFolder
from spo.progress import StopRequested, Watcher
from spo.rng import generator, stable_seed
from spo.training.host import Host, ladder_of
from spo.training.memory import Portion, in_portions
from spo.training.processes import ALONE, Processes, any_of, share_of

CHUNK = 64  # rows of the source that one file holds


@dataclass(frozen=True)
class FinishedPairs:
    """P pairs of clean latents, as the VAE expects them, on the CPU in float32: win, lose [P, C, h, w]; prompts: P."""

    prompts: list[str]
    win: Tensor
    lose: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @staticmethod
    def cat(parts: Sequence[FinishedPairs]) -> FinishedPairs:
        """One after the other."""
        return FinishedPairs(
            [prompt for part in parts for prompt in part.prompts],
            torch.cat([part.win for part in parts]),
            torch.cat([part.lose for part in parts]),
        )


def prompts_of_pairs(config: Config, prompts: Sequence[str]) -> list[str]:
    """The prompts that a run of method dpo needs: those of its pairs, or `prompts` where it makes them itself."""
    path = config.preference.pairs
    if not path:
        return list(prompts)
    if _is_votes(path):
        return [vote.prompt for vote in VoteFolder(path).votes() if vote.answer in ("left", "right")]
    return open_pairs(path).captions()


def finished_pairs(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    preference: PreferenceModel | None,
    folder: Path,
    portion: Portion,
    watcher: Watcher,
    processes: Processes = ALONE,
) -> FinishedPairs:
    """The pairs of a run, made or read into `folder`, `CHUNK` rows a file; what lies there already is taken as it is.

    prompts  of the pairs to be made, all known to the host; portion: how many pictures are made at a time; processes:
             who make them together

    Raises StopRequested between files, and SpoError when no pair is left.
    """

    def write(file: Path, of: range, shares: Sequence[FinishedPairs]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, FinishedPairs.cat([some for some in shares if len(some)] or shares[:1]))
        watcher.log(f"{of.stop} of {rows} pairs are ready.")

    path = config.preference.pairs
    rows: int
    chunk: Callable[[range], FinishedPairs]
    if not path:
        assert preference is not None, "without a preference model nothing labels the pairs"
        rows = len(prompts) * config.preference.pairs_per_prompt
        chunk = lambda some: _made(host, config, prompts, preference, some, portion, watcher)  # noqa: E731
    elif _is_votes(path):
        votes = VoteFolder(path)
        rows = len(votes.votes())
        chunk = lambda some: _voted(votes, some)  # noqa: E731
    else:
        source = open_pairs(path)
        rows = len(source)
        chunk = lambda some: _labelled(source, host, config, some)  # noqa: E731

    parts = []
    for first in range(0, rows, CHUNK):
        file = folder / f"{first // CHUNK:06d}.safetensors"
        of = range(first, min(first + CHUNK, rows))
        if not processes.on_main(file.exists):
            if any_of(processes, watcher.should_stop()):
                raise StopRequested
            mine = share_of(processes, of)
            shares = processes.gather(lambda mine=mine: chunk(mine) if mine else _none())  # type: ignore[misc]
            processes.on_main(lambda file=file, of=of, shares=shares: write(file, of, shares))  # type: ignore[misc]
        parts.append(processes.on_main(lambda file=file: _read(file)))  # type: ignore[misc]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise SpoError(
            "No pair is left to train on: all are ties, broken, or below the threshold "
            f"{config.rollout.threshold:g}; lower it, or give other pairs."
        )
    return FinishedPairs.cat(parts)


def noised(
    pairs: FinishedPairs, rows: Sequence[int], position: tuple[int | str, ...], config: Config, host: Host
) -> Pairs:
    """The pairs of `rows`, both sides with the same noise at a timestep drawn uniformly, as transitions to the clean
    latents (see `objective`). Timesteps from timestep_min to timestep_max, both included.

    position  what the draws of each row depend on besides the row
    """
    levels = training_sigmas(host.alphas_cumprod)
    low, high = config.rollout.timestep_min, min(config.rollout.timestep_max, len(levels) - 1)
    timesteps, noises = [], []
    for row in rows:
        draws = generator(*position, row)
        timesteps.append(int(torch.randint(low, high + 1, (1,), generator=draws)))
        noises.append(torch.randn(pairs.win.shape[1:], generator=draws))
    index = torch.tensor(list(rows))
    sigma, noise = levels.cpu()[torch.tensor(timesteps)].float(), torch.stack(noises)
    win, lose, added = pairs.win[index], pairs.lose[index], sigma[:, None, None, None] * noise
    ladder = ladder_of(config, host.alphas_cumprod.cpu())[:-1]
    step = (ladder[None] > sigma[:, None]).sum(1).clamp(max=len(ladder) - 1)
    return Pairs(
        win + added, lose + added, win, lose,
        shared=torch.zeros(len(index), dtype=torch.bool),
        sigma=sigma,
        sigma_next=torch.zeros_like(sigma),
        image=torch.arange(len(index)),
        step=step,
        gap=torch.ones_like(sigma),
    ).to(host.device)  # fmt: skip


def _none() -> FinishedPairs:
    return FinishedPairs([], torch.zeros(0), torch.zeros(0))


def _is_votes(path: str) -> bool:
    return (Path(path).expanduser() / LINES).exists()


def _made(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    preference: PreferenceModel,
    rows: range,
    portion: Portion,
    watcher: Watcher,
) -> FinishedPairs:
    """Two pictures for each row, of a prompt in turn, labelled by the preference model. The adapter is fresh then, so
    the pictures are the reference's."""
    plain = RolloutSettings(candidates=1, eta=config.rollout.eta)

    def some(part: range) -> FinishedPairs:
        numbers = [rows[n] for n in part]
        texts = [prompts[number % len(prompts)] for number in numbers]
        seeds = [stable_seed(config.run.seed, "finished pair", number, side) for side in (0, 1) for number in numbers]
        rollout = host.rollout(texts * 2, seeds, plain, None, None)
        sides = rollout.x.unflatten(0, (2, -1))
        with torch.no_grad():
            pool = Candidates(sides, rollout.sigma, 0.0, sides, host.decode, host.text_features(texts))
            scores = preference.score(pool, texts).float()
        chosen = select_pairs(scores, config.rollout.threshold)
        kept = chosen.kept.nonzero()[:, 0]
        return FinishedPairs(
            [texts[n] for n in kept.tolist()],
            sides[chosen.win[kept], kept].float().cpu(),
            sides[chosen.lose[kept], kept].float().cpu(),
        )

    advice = "choose a smaller width and height, or close other programs"
    return FinishedPairs.cat(in_portions(some, len(rows), portion, watcher.log, advice))


def _voted(folder: VoteFolder, rows: range) -> FinishedPairs:
    votes = folder.votes()[rows.start : rows.stop]
    chosen = [vote for vote in votes if vote.answer in ("left", "right")]
    if not chosen:
        return _none()
    latents = torch.stack([folder.latents(vote.id) for vote in chosen])
    left = torch.tensor([vote.answer == "left" for vote in chosen])[:, None, None, None]
    first, second = latents[:, 0], latents[:, 1]
    return FinishedPairs(
        [vote.prompt for vote in chosen], torch.where(left, first, second), torch.where(left, second, first)
    )


def _labelled(source: PairSource, host: Host, config: Config, rows: range) -> FinishedPairs:
    prompts, wins, loses = [], [], []
    size = config.prompt.width, config.prompt.height
    for pair in source.pairs(0, -1, rows.start):
        if pair.row >= rows.stop:
            break
        if pair.label_0 == 0.5:
            continue
        pictures = [picture_tensor(picture, *size) for picture in (pair.picture_0, pair.picture_1)]
        with torch.no_grad():
            first, second = host.encode(torch.stack(pictures).to(host.device)).float().cpu()
        prompts.append(pair.caption)
        wins.append(first if pair.label_0 > 0.5 else second)
        loses.append(second if pair.label_0 > 0.5 else first)
    if not prompts:
        return _none()
    return FinishedPairs(prompts, torch.stack(wins), torch.stack(loses))


def _write(path: Path, pairs: FinishedPairs) -> None:
    from safetensors.torch import save_file

    tensors = {"win": pairs.win.contiguous(), "lose": pairs.lose.contiguous()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, {"prompts": json.dumps(pairs.prompts)}))


def _read(path: Path) -> FinishedPairs:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return FinishedPairs(json.loads(file.metadata()["prompts"]), file.get_tensor("win"), file.get_tensor("lose"))
