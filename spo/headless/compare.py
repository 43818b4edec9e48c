"""Base against LoRA files, at weights, over prompts and seeds: one grid, scores, win rates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spo.algorithm.preference import Candidates, PreferenceModel
from spo.algorithm.rollout import RolloutSettings
from spo.config import Config
from spo.errors import SpoError
from spo.headless.host import HeadlessHost, load_host
from spo.images import to_picture
from spo.lora.adapter import Adapter
from spo.lora.read import check_matches, read_lora
from spo.preference.load import load_preference
from spo.report.grids import grid
from spo.report.tables import score_table


@dataclass(frozen=True)
class Samples:
    """Finished pictures of N prompt-and-seed pairs, on the CPU: latents [N, 4, h, w], pixels [N, 3, H, W] in [-1, 1],
    scores [N] of the preference model at timestep 0."""

    latents: Tensor
    pixels: Tensor
    scores: Tensor


def samples(
    host: HeadlessHost, preference: PreferenceModel, prompts: Sequence[str], seeds: Sequence[int], batch: int = 16
) -> Samples:
    """Sample one picture for each prompt and seed with the network as it is, and score it. Prompts must be prepared."""
    plain = RolloutSettings(candidates=1, eta=host.config.rollout.eta)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, len(prompts), batch):
        told = prompts[first : first + batch]
        rolled = host.rollout(told, seeds[first : first + batch], plain, None, None)
        latents = rolled.x
        pool = Candidates(latents[None], rolled.sigma, 0.0, latents[None], host.decode)
        pixels = pool.pixels()[0]
        parts.append((latents.cpu(), pixels.cpu(), preference.score(pool, told)[0].cpu()))
    return Samples(*(torch.cat(part) for part in zip(*parts, strict=True)))


def adapter_from_file(host: HeadlessHost, path: Path) -> Adapter:
    """Put a LoRA file on the host's network. Raises SpoError when the file is not a LoRA for it."""
    layers = check_matches(read_lora(path), host.network, host.naming, host.architecture)
    return Adapter(host.network, [], rank=1, alpha=1, start=layers)


def compare_loras(
    config: Config, prompts: Sequence[str], seeds: Sequence[int], loras: Sequence[Path], weights: Sequence[float]
) -> str:
    """Write the grid to `config.run.output` (a .png) and return the table of mean scores and win rates as text."""
    output = Path(config.run.output)
    if output.suffix.lower() != ".png":
        raise SpoError(f'output is "{output}"; compare writes a .png.')
    if output.exists() and not config.run.replace:
        raise SpoError(f'"{output}" exists already; choose another name, or --replace.')
    if not output.absolute().parent.is_dir():
        raise SpoError(f'the folder "{output.parent}" does not exist; make it or choose another one.')
    for path in loras:
        read_lora(path)
    rows = list(itertools.product(prompts, seeds))
    told, drawn = [prompt for prompt, _ in rows], [seed for _, seed in rows]
    host = load_host(config)
    preference = load_preference(config, host.device, host.architecture)
    host.prepare(told)
    columns = {"base": samples(host, preference, told, drawn)}
    for path in loras:
        adapter = adapter_from_file(host, path)
        for weight in weights:
            adapter.set_multiplier(weight)
            columns[f"{path.stem} : {weight:g}"] = samples(host, preference, told, drawn)
        adapter.remove()
    save_grid(columns, [f"{prompt}\nseed {seed}" for prompt, seed in rows], output)
    return score_table({label: column.scores.tolist() for label, column in columns.items()}, preference.name)


def save_grid(columns: dict[str, Samples], row_labels: Sequence[str], output: Path) -> None:
    """Pictures with their scores under them, one column for each of `columns`."""
    pictures = [[to_picture(column.pixels[row]) for column in columns.values()] for row in range(len(row_labels))]
    captions = [[f"{float(column.scores[row]):.2f}" for column in columns.values()] for row in range(len(row_labels))]
    grid(pictures, row_labels, list(columns), captions).save(output)
