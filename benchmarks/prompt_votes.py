"""A rule that flips with the prompt: what a taste head that may read it learns, beside one that may not.

    OMP_NUM_THREADS=1 python -m benchmarks.prompt_votes --work FOLDER

Simulated voters and pairs of simulated_voters.py (its stage `pairs` first; as many of them as there are), 10 % of the
answers flipped. Each row is one fit to one draw of votes, judged by the order of held-out pairs in truth, noise of its
own on both pictures, at timesteps 1, 201, 401 and 601. What is in FOLDER/prompt_votes.csv is not done again.

The rule holds for one half of the subjects and its opposite for the other: the two clusters that the checkpoint's text
features fall into. Both heads are the product's fit; that of votes that do not depend on the prompt stands beside.

asked   pairs, or pools of four (few_votes.py's stage `pools` first); votes counts the keys that were pressed, two to a
        pool, each of which says five comparisons
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.pools import COMPARISONS, read_bank
from benchmarks.rows import add_row, is_done
from benchmarks.simulated_voters import FLIPPED, TASTES, TIMESTEPS, pair_prompts, rule_of
from spo.algorithm.diffusion import scaled_linear_alphas_cumprod, training_sigmas
from spo.demo.run import demo_config
from spo.errors import SpoError
from spo.files import write_whole
from spo.headless.host import load_host
from spo.preference.taste.fit import VoteSet, fit_taste
from spo.preference.taste.head import TasteHead
from spo.rng import generator

TABLE = "prompt_votes.csv"
RULES, ASKED, KEYS = ("colourful", "large"), ("pools", "pairs"), (300, 200, 100)


@dataclass(frozen=True)
class World:
    """Pairs to vote on or to judge by: latents [N, 2, 4, 8, 8], texts [N, 64]; of a taste differences [N], left less
    right, in truth."""

    latents: Tensor
    texts: Tensor
    differences: dict[str, Tensor]

    def of(self, rows: Tensor) -> World:
        differences = {taste: value[rows] for taste, value in self.differences.items()}
        return World(self.latents[rows], self.texts[rows], differences)

    def votes(self, rows: Tensor, taste: str, seed: int) -> VoteSet:
        answers = (self.differences[taste][rows] > 0).float()
        flipped = torch.rand(len(self.latents), generator=generator("few", taste, seed))[rows] < FLIPPED
        answers = torch.where(flipped, 1 - answers, answers)
        ids = tuple(map(str, rows.tolist()))
        return VoteSet(self.latents[rows], answers, ids, "sd15", "demo", "", texts=self.texts[rows])


def read_world(work: Path, part: str) -> World:
    batches = [load_file(path) for path in sorted((work / "pairs").glob(f"{part}_*.safetensors"))]
    latents = torch.cat([batch["latents"] for batch in batches]).float()
    pixels = torch.cat([batch["pixels"] for batch in batches]).float() / 127.5 - 1
    prompts = pair_prompts(part)[: len(latents)]
    texts = text_features(work, part, prompts)
    values = {taste: rule_of(taste, pixels.flatten(0, 1)).unflatten(0, (-1, 2)) for taste in TASTES}
    return World(latents, texts, {t: v[:, 0] - v[:, 1] for t, v in values.items()})


def text_features(work: Path, part: str, prompts: list[str]) -> Tensor:
    path = work / f"texts_{part}_{len(prompts)}.safetensors"
    if not path.exists():
        host = load_host(demo_config(work))
        host.prepare(list(dict.fromkeys(prompts)))
        features = host.text_features(prompts).contiguous()
        write_whole(path, lambda temporary: save_file({"texts": features}, temporary))
    return load_file(path)["texts"]


def judged(head: TasteHead, world: World, differences: Tensor) -> dict[str, float]:
    """Accuracy at each timestep, the mean of two noises, and at timestep 1 of pairs that differ more than half do."""
    result = {}
    for timestep in TIMESTEPS:
        sigma = float(training_sigmas(scaled_linear_alphas_cumprod())[timestep])
        draw = generator("few held out", timestep)
        right = torch.zeros(len(differences))
        for _ in range(2):
            noisy = (world.latents + sigma * torch.randn(world.latents.shape, generator=draw)).flatten(0, 1)
            codes = head.prompt_codes(world.texts.repeat_interleave(2, 0), noisy.device)
            scores = head.member_scores(noisy, sigma, codes).mean(0).unflatten(0, (-1, 2))
            right += ((scores[:, 0] > scores[:, 1]) == (differences > 0)).float() / 2
        result[f"at {timestep}"] = float(right.mean())
        if timestep == TIMESTEPS[0]:
            result["clear"] = float(right[differences.abs() > differences.abs().median()].mean())
    return result


# ---------------------------------------------------------------------------------------------- rules of the prompt


def clusters(texts: Tensor) -> Tensor:
    """[N] bool: in which of two clusters each feature is, by the direction in which they differ most (2-means)."""
    centred = texts - texts.mean(0)
    inside = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0] > 0
    for _ in range(50):
        centres = torch.stack([centred[inside].mean(0), centred[~inside].mean(0)])
        inside = torch.cdist(centred, centres).argmin(1) == 0
    return inside


def measure_prompt(work: Path, draws: int) -> None:
    """Votes and judging pairs are half of each cluster's; those that are new have prompts that no vote has."""
    world, held, pools = read_world(work, "votes"), read_world(work, "held_out"), read_bank(work)
    inside = clusters(torch.cat([world.texts, held.texts]))
    of_votes, of_held = inside[: len(world.texts)], inside[len(world.texts) :]
    of_pools = of_votes[: len(pools.latents)]  # of the same prompts, in the same order
    judging = half_of_each(torch.arange(len(of_held)), of_held, len(of_held))
    for seed, taste, turns, asked, keys in itertools.product(range(draws), RULES, (True, False), ASKED, KEYS):
        key = {"taste": taste, "flips": str(turns), "asked": asked, "votes": str(keys), "draw": str(seed)}
        order = torch.randperm(len(world.latents), generator=generator("few order", seed))
        known, new = flipped(world, of_votes, turns), flipped(held, of_held, turns)
        if asked == "pairs":
            rows = half_of_each(order, of_votes, keys)
            votes = known.votes(rows, taste, seed)
            others = torch.tensor([n for n in range(len(world.latents)) if n not in set(rows.tolist())])
        else:
            rows = half_of_each(order[order < len(of_pools)], of_pools, keys // 2)
            sign = torch.where(of_pools & turns, -1.0, 1.0)[:, None]
            turned = replace(pools, values={name: sign * value for name, value in pools.values.items()})
            texts = world.texts[rows].repeat_interleave(COMPARISONS, 0)
            votes, others = replace(turned.votes(rows, taste, seed), texts=texts), torch.arange(len(world.latents))
        known = known.of(half_of_each(others, of_votes, len(others)))
        add_prompt_rows(work, key, votes, known, new.of(judging))


def half_of_each(order: Tensor, inside: Tensor, count: int) -> Tensor:
    one, other = order[inside[order]], order[~inside[order]]
    some = min(len(one), len(other), count // 2)
    return torch.cat([one[:some], other[:some]])


def flipped(world: World, inside: Tensor, flips: bool) -> World:
    sign = torch.where(inside & flips, -1.0, 1.0)
    return replace(world, differences={taste: sign * value for taste, value in world.differences.items()})


def add_prompt_rows(work: Path, key: dict[str, str], votes: VoteSet, known: World, new: World) -> None:
    """known: pairs of prompts that were voted on; new: of others."""
    for head_name in ("today's", "product"):
        if is_done(work / TABLE, key | {"head": head_name}):
            continue
        began = time.process_time()
        reads, result = "False", {"refused": ""}
        try:
            with torch.enable_grad():
                made = fit_taste(votes if head_name == "product" else replace(votes, texts=None))
            reads = str(made.report.reads_prompt)
            of_known = judged(made.head, known, known.differences[key["taste"]])
            result |= judged(made.head, new, new.differences[key["taste"]])
            result |= {f"known prompts {name}": value for name, value in of_known.items()}
        except SpoError:
            result = {"refused": "no better than chance"}
        full = key | {"head": head_name, "reads": reads, "comparisons": str(len(votes.answers))}
        empty = {f"{before}{n}": math.nan for before in ("", "known prompts ") for n in judging_names()}
        add_row(work / TABLE, full | empty | result, began)


def judging_names() -> list[str]:
    return ["at 1", "clear", *(f"at {timestep}" for timestep in TIMESTEPS[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        measure_prompt(options.work, options.draws)


if __name__ == "__main__":
    main()
