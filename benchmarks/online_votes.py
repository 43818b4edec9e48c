"""Votes given while training, against as many given before: which LoRA gains more by the voter's rule?

    OMP_NUM_THREADS=1 python benchmarks/online_votes.py --work FOLDER --taste grey --seed 0

On the demo checkpoint, with simulated voters as in simulated_voters.py (a rule that training never sees, 10 % of the
answers flipped). Both runs have the same settings, seed, number of updates and of votes:

    before   100 votes on the checkpoint's own pictures, one head, one run
    online   40 such votes and a head to begin with, the other 60 on pictures of the policy as it is, spread over the
             first two thirds of the updates; the head is refitted to all after every 15 (spo/training/live_taste.py)

The LoRA is judged by the rule on held-out pairs of prompt and seed. FOLDER/online.json grows by one row a run; what is
there is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.simulated_voters import FLIPPED, TASTES, rule_of
from spo.config import Config
from spo.demo.judge import Judge, held_out
from spo.demo.run import demo_config
from spo.files import write_text
from spo.headless.compare import adapter_from_file, pictures
from spo.headless.host import HeadlessHost, load_host
from spo.preference.taste.fit import (
    FitReport,
    FitSettings,
    FittedTaste,
    HeldOutAccuracy,
    VoteSet,
    fit_member,
    read_vote_set,
)
from spo.preference.taste.head import TasteFacts, TasteHead
from spo.preference.taste.votes import VoteFolder, VotePool
from spo.progress import Progress, Watcher
from spo.prompts import read_prompts
from spo.report.win_rate import win_rate
from spo.rng import generator, permutation, stable_seed
from spo.runs.layout import RunFiles
from spo.training.live_taste import LiveTaste
from spo.training.loop import train
from spo.training.vote_pairs import make_pools

VOTES, FIRST_VOTES, REFIT_EVERY = 100, 40, 15
BATCH = 10


def fit(votes: VoteSet) -> FittedTaste:
    """Three members on all votes, none held out: quick, and without the product's refusal of heads near chance."""
    with torch.enable_grad():
        settings = FitSettings(updates=100)
        members = [fit_member(votes.latents, votes.answers, settings, member) for member in range(3)]
    head = TasteHead(members, TasteFacts(votes=len(votes.answers)))
    unknown = HeldOutAccuracy("taste head", 1, float("nan"), 0, 1)
    return FittedTaste(head, FitReport(len(votes.answers), 0, 0, 0.0, (unknown,)))


class Voter:
    """Answers by the rule of a taste, 10 % flipped by the pair's own coin."""

    def __init__(self, taste: str, seed: int) -> None:
        self.taste, self.seed = taste, seed

    def vote(self, folder: VoteFolder, pools: list[VotePool]) -> None:
        for pool in pools:
            left, right = rule_of(self.taste, torch.stack([_pixels(picture) for picture in pool.pictures])).tolist()
            coin = float(torch.rand((), generator=generator("flip", self.seed, pool.id)))
            folder.add_pool(pool, {(0, 1): "left" if (left > right) != (coin < FLIPPED) else "right"})


def _pixels(picture: object) -> Tensor:
    import numpy as np
    from PIL import Image

    opened = Image.open(picture) if isinstance(picture, Path) else picture
    return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1  # type: ignore[attr-defined]


def first_pools(work: Path, host: HeadlessHost, config: Config, seed: int) -> list[VotePool]:
    """The checkpoint's own pictures to vote on, kept in FOLDER."""
    path = work / f"base_pools_{seed}.pt"
    if not path.exists():
        prompts = read_prompts(config.prompt.prompts)
        pools: list[VotePool] = []
        for first in range(0, VOTES, BATCH):
            chosen = [prompts[stable_seed("base", seed, first + n) % len(prompts)] for n in range(BATCH)]
            host.prepare(list(dict.fromkeys(chosen)))
            seeds = [stable_seed("base seed", seed, first + n) % 2**32 for n in range(BATCH)]
            made = make_pools(host, chosen, seeds, 2, round(0.2 * config.rollout.sampling_steps), config.rollout.eta)
            pools += [pool.shuffled(permutation(2, "side", seed, first + n)) for n, pool in enumerate(made)]
        torch.save(pools, path)
    return torch.load(path, weights_only=False)


def run(work: Path, taste: str, seed: int, online: bool, updates: int, steps: int, rate: float) -> None:
    name = f"{'online' if online else 'before'}_{taste}_{seed}"
    rows = read_rows(work)
    if any(row["run"] == name and row["updates"] == updates for row in rows):
        return
    output = work / f"{name}.safetensors"
    values = {"output": str(output), "preference": "", "sample_every": 0, "save_every": 10, "validate_every": 0}
    values |= {"steps": updates, "sampling_steps": steps, "seed": seed, "learning_rate": rate, "step_weight": "paper"}
    config = demo_config(work, values)
    host = load_host(config)
    voter, folder, began = Voter(taste, seed), VoteFolder(work / f"votes_{name}"), time.process_time()
    files = RunFiles.of(output)
    if not files.state.exists():
        shutil.rmtree(folder.path, ignore_errors=True)
        voter.vote(folder, first_pools(work, host, config, seed)[: FIRST_VOTES if online else VOTES])
    head = fit(read_vote_set(folder)).head
    preference = LiveTaste(
        head, folder, fit=fit, say=lambda text: print(name, text, flush=True), refit_every=REFIT_EVERY
    )
    if not online:
        preference.before_rollout = lambda *args: False  # type: ignore[method-assign]

    def vote(now: Progress) -> None:
        if online and now.phase == "rollout":
            wanted = min(VOTES, FIRST_VOTES + round((VOTES - FIRST_VOTES) * 1.5 * (now.step + 1) / updates))
            voter.vote(folder, preference.waiting.to_vote_on()[: max(0, wanted - len(folder.votes()))])

    prompts = read_prompts(config.prompt.prompts)
    with torch.enable_grad():
        train(host, config, prompts, preference, Watcher(progress=vote), resume=files.state.exists())
    seconds = time.process_time() - began
    facts = {"run": name, "taste": taste, "seed": seed, "online": online, "updates": updates, "learning_rate": rate}
    rows.append({**facts, "votes": len(folder.votes()), **judged(work, host, output, taste), "cpu_seconds": seconds})
    write_text(work / "online.json", json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows[-1]), flush=True)


def judged(work: Path, host: HeadlessHost, lora: Path, taste: str) -> dict[str, float]:
    """The rule's means before and after, the share of pairs won, subjects recognised before and after."""
    prompts, seeds = held_out()
    host.prepare(prompts)
    base = work / f"base_{host.config.rollout.sampling_steps}.pt"
    if not base.exists():
        torch.save(pictures(host, prompts, seeds, eta=host.config.rollout.eta), base)
    before = torch.load(base)
    adapter = adapter_from_file(host, lora)
    after = pictures(host, prompts, seeds, eta=host.config.rollout.eta)
    adapter.remove()
    values, judge = [rule_of(taste, pixels) for pixels in (before, after)], Judge()
    return {
        "before": float(values[0].mean()),
        "after": float(values[1].mean()),
        "wins": win_rate(values[1].tolist(), values[0].tolist()).rate,
        "recognised_before": judge.judge(before, prompts).recognised_share,
        "recognised_after": judge.judge(after, prompts).recognised_share,
    }


def read_rows(work: Path) -> list[dict[str, object]]:
    path = work / "online.json"
    return json.loads(path.read_text()) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--taste", choices=TASTES, nargs="+", default=["grey"])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--sampling-steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for seed in options.seed:
            for taste in options.taste:
                for online in (True, False):
                    run(
                        options.work,
                        taste,
                        seed,
                        online,
                        options.updates,
                        options.sampling_steps,
                        options.learning_rate,
                    )


if __name__ == "__main__":
    main()
