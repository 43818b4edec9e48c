"""Base against LoRA files, at weights, over prompts and seeds: one grid, scores, win rates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spo.algorithm.preference import Candidates, PreferenceModel
from spo.algorithm.rollout import Rollout, RolloutSettings
from spo.config import Config
from spo.errors import SpoError
from spo.evaluation.summary import rows_of
from spo.headless.host import load_host
from spo.images import to_picture
from spo.lora.adapter import Adapter
from spo.lora.read import check_matches, read_lora
from spo.preference.load import load_preference
from spo.report.grids import grid
from spo.report.tables import score_table
from spo.training.host import Host
from spo.training.memory import Portion, in_portions, loaded_scorer

LESS_MEMORY = "choose a smaller width and height, a smaller preference model, or close other programs"


@dataclass(frozen=True)
class Samples:
    """Finished pictures of N prompt-and-seed pairs, on the CPU: latents [N, 4, h, w], pixels [N, 3, H, W] in [-1, 1],
    scores [N] of the preference model at timestep 0."""

    latents: Tensor
    pixels: Tensor
    scores: Tensor


def samples(
    host: Host,
    preference: PreferenceModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    eta: float,
    batch: int = 16,
) -> Samples:
    """Sample one picture for each prompt and seed with the network as it is, and score it. Prompts must be prepared.

    eta    fresh noise at each step, as in `RolloutSettings`
    batch  at a time; fewer when memory runs out
    """

    def some(rows: range) -> tuple[Tensor, Tensor, Tensor]:
        part = slice(rows.start, rows.stop)
        rollout = plain_rollout(host, prompts[part], seeds[part], eta)
        text = host.text_features(prompts[part])
        pool = Candidates(rollout.x[None], rollout.sigma, 0.0, rollout.x[None], host.decode, text)
        pixels = pool.pixels()[0].clamp(-1, 1).cpu()
        return rollout.x.cpu(), pixels, preference.score(pool, prompts[part])[0].cpu()

    parts = in_portions(some, len(prompts), Portion("pictures at a time", batch), warnings.warn, LESS_MEMORY)
    return Samples(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def pictures(host: Host, prompts: Sequence[str], seeds: Sequence[int], *, eta: float, batch: int = 16) -> Tensor:
    """[N, 3, height, width] in [-1, 1] on the CPU: the pictures of `samples` without scores."""

    def some(rows: range) -> Tensor:
        part = slice(rows.start, rows.stop)
        return host.decode(plain_rollout(host, prompts[part], seeds[part], eta).x).clamp(-1, 1).cpu()

    return torch.cat(in_portions(some, len(prompts), Portion("pictures at a time", batch), warnings.warn, LESS_MEMORY))


def plain_rollout(host: Host, prompts: Sequence[str], seeds: Sequence[int], eta: float) -> Rollout:
    """Ordinary ancestral sampling, no pools."""
    return host.rollout(prompts, seeds, RolloutSettings(candidates=1, eta=eta), None, None)


def adapter_from_file(host: Host, path: Path) -> Adapter:
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
    check_writable(output, config.run.replace)
    for path in loras:
        read_lora(path)
    rows = rows_of(prompts, seeds)
    row_prompts, row_seeds = [prompt for prompt, _ in rows], [seed for _, seed in rows]
    host = load_host(config)
    preference = loaded_scorer(lambda: load_preference(config, host.device, host.architecture), warnings.warn)
    host.prepare(row_prompts)
    sample = partial(samples, host, preference, row_prompts, row_seeds, eta=config.rollout.eta)
    columns = {"base": sample()}
    for path in loras:
        adapter = adapter_from_file(host, path)
        for weight in weights:
            adapter.set_multiplier(weight)
            columns[f"{path.stem} : {weight:g}"] = sample()
        adapter.remove()
    save_grid(columns, [f"{prompt}\nseed {seed}" for prompt, seed in rows], output)
    return score_table({label: column.scores.tolist() for label, column in columns.items()}, preference.name)


def check_writable(output: Path, replace: bool) -> None:
    """SpoError when something is there that may not be replaced, or there is no folder to write it in."""
    if output.exists() and not replace:
        raise SpoError(f'"{output}" exists already; choose another name, or --replace.')
    if not output.absolute().parent.is_dir():
        raise SpoError(f'the folder "{output.parent}" does not exist; make it or choose another one.')


def save_grid(columns: dict[str, Samples], row_labels: Sequence[str], output: Path) -> None:
    """Pictures with their scores under them, one column for each of `columns`."""
    pictures = [[to_picture(column.pixels[row]) for column in columns.values()] for row in range(len(row_labels))]
    captions = [[f"{float(column.scores[row]):.2f}" for column in columns.values()] for row in range(len(row_labels))]
    grid(pictures, row_labels, list(columns), captions).save(output)
