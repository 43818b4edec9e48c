"""Simulated votes on pools of four: the best and the worst are named in two keys, which say five comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.simulated_voters import BATCH, FLIPPED, TASTES, pair_prompts, rule_of
from benchmarks.taste_slider import as_tensor
from spo.demo.run import demo_config
from spo.files import write_whole
from spo.headless.host import load_host
from spo.preference.taste.fit import VoteSet
from spo.rng import generator, stable_seed
from spo.training.vote_pairs import make_pools

POOLS, COMPARISONS = 240, 5


@dataclass(frozen=True)
class Pools:
    """latents [N, 4, 4, 8, 8]; of a taste values [N, 4]."""

    latents: Tensor
    values: dict[str, Tensor]

    def votes(self, rows: Tensor, taste: str, seed: int) -> VoteSet:
        """Two keys each: the best and, of the other three, the worst."""
        pairs, answers = [], []
        for row in rows.tolist():
            draw = generator("few pools", taste, seed, row)
            order = self.values[taste][row].argsort(descending=True).tolist()
            best = _pressed(order, 0, draw)
            worst = _pressed([one for one in order if one != best], -1, draw)
            middle = [one for one in order if one not in (best, worst)]
            for better, worse in [(best, worst), *((best, one) for one in middle), *((one, worst) for one in middle)]:
                swapped = bool(torch.rand((), generator=draw) < 0.5)
                pairs.append(self.latents[row, [worse, better] if swapped else [better, worse]])
                answers.append(float(not swapped))
        return VoteSet(
            torch.stack(pairs), torch.tensor(answers), tuple(map(str, range(len(pairs)))), "sd15", "demo", "",
            groups=tuple(n // COMPARISONS for n in range(len(pairs))),
        )  # fmt: skip


def _pressed(order: list[int], meant: int, draw: torch.Generator) -> int:
    others = [one for one in order if one != order[meant]]
    if torch.rand((), generator=draw) >= FLIPPED:
        return order[meant]
    return others[int(torch.randint(len(others), (), generator=draw))]


def make_bank(work: Path) -> None:
    folder = work / "pools"
    folder.mkdir(parents=True, exist_ok=True)
    host, prompts = load_host(demo_config(work)), pair_prompts("votes")
    for first in range(0, POOLS, BATCH):
        path = folder / f"{first:04}.safetensors"
        if not path.exists():
            some = prompts[first : first + BATCH]
            host.prepare(list(dict.fromkeys(some)))
            seeds = [stable_seed("few pools", first + n) % 2**32 for n in range(len(some))]
            made = make_pools(host, some, seeds, 4, 2 + first // BATCH % 9)
            pixels = torch.stack([torch.stack([as_tensor(one) for one in pool.pictures]) for pool in made])
            tensors = {"latents": torch.stack([pool.latents for pool in made]), "pixels": pixels}
            write_whole(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))  # type: ignore[misc]
            print(path.name, flush=True)


def read_bank(work: Path) -> Pools:
    batches = [load_file(path) for path in sorted((work / "pools").glob("*.safetensors"))]
    pixels = torch.cat([batch["pixels"] for batch in batches]).float() / 127.5 - 1
    values = {taste: rule_of(taste, pixels.flatten(0, 1)).unflatten(0, (-1, 4)) for taste in TASTES}
    return Pools(torch.cat([batch["latents"] for batch in batches]).float(), values)
