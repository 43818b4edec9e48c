"""What a key press teaches: which pictures to ask about, how to fit the answers, and what the LoRA gains by it.

    OMP_NUM_THREADS=1 python -m benchmarks.few_votes STAGE --work FOLDER

Simulated voters and pairs of simulated_voters.py (its stage `pairs` first; as many of them as there are). One key in
ten falls on another picture than was meant. What is in FOLDER is not done again. Stages:

    pools     pools of four pictures of the same prompts, parted at the same steps
    accuracy  heads judged by the order of held-out pairs in truth, noise of its own on both pictures, at timesteps 1,
              201, 401 and 601; each row is one draw of votes
    gain      the demo's LoRA that follows a head, 30 updates, judged by the rule on held-out prompts and seeds

Heads, of so many keys:

    random    pairs at random, the product's fit
    spread    of every eight pairs the one that the members of a head fitted to the votes before disagree about most
              (half of the pairs at random, then twice a quarter so)
    bald      the same by what an answer says about the members (BALD, Houlsby et al. 2011, arXiv 1112.5745)
    clear     the one about which they are surest
    early     of the half of the pairs that part first; late: of the other half
    ties      an eighth of the answers, those about the closest pairs, are ties
    variance  the log-odds are divided by the root of 1 + (s / c)^2 with s the share of noise, c learnt
    pools     the best and the worst of pools of four at random, which say five comparisons in two keys
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.online_votes import judged as judged_lora
from benchmarks.pools import Pools, make_bank, read_bank
from benchmarks.prompt_votes import World, judged, read_world
from benchmarks.rows import add_row, is_done
from benchmarks.simulated_voters import BATCH, TASTES
from spo.algorithm.diffusion import scaled_linear_alphas_cumprod, training_sigmas
from spo.demo.run import demo_config
from spo.headless.host import load_host
from spo.preference.taste.fit import FitSettings, VoteSet, davidson_loss, fit_member
from spo.preference.taste.head import TasteFacts, TasteHead, TasteNetwork
from spo.progress import Watcher
from spo.prompts import read_prompts
from spo.rng import generator
from spo.training.loop import train

MEMBERS, UPDATES = 3, 100
HEADS = (
    *(f"random {keys}" for keys in (50, 100, 200)),
    *(f"pools {keys}" for keys in (50, 100, 200)),
    *(f"{name} 100" for name in ("spread", "bald", "clear", "early", "late", "ties", "variance")),
)
TRAINED = ("random 100", "random 200", "pools 50", "pools 100")
LORA = {"steps": 30, "sampling_steps": 10, "learning_rate": 6e-4, "step_weight": "paper"}


# ---------------------------------------------------------------------------------------------- heads


def fitted(votes: VoteSet, fit: Callable[..., TasteNetwork] = fit_member) -> TasteHead:
    with torch.enable_grad():
        members = [fit(votes.latents, votes.answers, FitSettings(updates=UPDATES), member) for member in range(MEMBERS)]
    return TasteHead(members, TasteFacts(votes=len(votes.answers)))


def asked_about(
    world: World, taste: str, seed: int, order: Tensor, keys: int, by: Callable[[Tensor], Tensor]
) -> Tensor:
    """Rows: half of the keys at random, and twice a quarter, of every eight of the next the best by the members'
    probabilities [M, N]."""
    rows, rest = order[: keys // 2], order[keys // 2 :]
    for _ in range(2):
        head = fitted(world.votes(rows, taste, seed))
        next_ones, rest = rest[: 8 * (keys // 4)], rest[8 * (keys // 4) :]
        scores = head.member_scores(world.latents[next_ones].flatten(0, 1), 0.0).unflatten(1, (-1, 2))
        best = by((scores[..., 0] - scores[..., 1]).sigmoid()).unflatten(0, (-1, 8)).argmax(1)
        rows = torch.cat([rows, next_ones.unflatten(0, (-1, 8)).gather(1, best[:, None])[:, 0]])
    return rows


def spread(probabilities: Tensor) -> Tensor:
    return probabilities.std(0)


def bald(probabilities: Tensor) -> Tensor:
    """Mutual information of the answer and the member, in nats: entropy of the mean less mean of the entropies."""

    def entropy(p: Tensor) -> Tensor:
        p = p.clamp(1e-6, 1 - 1e-6)
        return -(p * p.log() + (1 - p) * (1 - p).log())

    return entropy(probabilities.mean(0)) - entropy(probabilities).mean(0)


def clear(probabilities: Tensor) -> Tensor:
    return (probabilities.mean(0) - 0.5).abs()


CHOICES = {"spread": spread, "bald": bald, "clear": clear}


def fit_with_variance(latents: Tensor, answers: Tensor, settings: FitSettings, member: int) -> TasteNetwork:
    """As `fit_member`, but an answer's log-odds are the difference over the root of 1 + (s / c)^2, s^2 = 2 sigma^2 /
    (1 + sigma^2) the noise of both sides: noise that hides the pictures makes answers less certain, and c is learnt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(member)
        network = TasteNetwork(settings.width)
    log_c, log_tie = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.tensor(-1.0))
    groups = [{"params": list(network.parameters())}, {"params": [log_c, log_tie], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.updates)
    sigmas = training_sigmas(scaled_linear_alphas_cumprod())[: settings.timestep_max + 1].float()
    draw = generator("variance", member)
    for _ in range(settings.updates):
        rows = torch.randperm(len(latents), generator=draw)[: settings.pairs_per_update]
        sigma = sigmas[torch.randint(len(sigmas), (len(rows),), generator=draw)]
        levels = sigma.repeat_interleave(2)
        noise = torch.randn(latents[rows].shape, generator=draw)
        noisy = (latents[rows] + sigma[:, None, None, None, None] * noise).flatten(0, 1)
        seen = noisy / (1 + levels[:, None, None, None] ** 2).sqrt()
        scores = network(seen, levels).unflatten(0, (-1, 2))
        share = 2 * sigma**2 / (1 + sigma**2)
        difference = (scores[:, 0] - scores[:, 1]) / (1 + share / (2 * log_c).exp()).sqrt()
        loss = davidson_loss(difference, answers[rows], log_tie).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return network.eval().requires_grad_(False)


def head_of(name: str, world: World, pools: Pools, taste: str, seed: int) -> TasteHead:
    way, keys = name.split()[0], int(name.split()[1])
    order = torch.randperm(len(world.latents), generator=generator("few order", seed))
    if way == "pools":
        order = torch.randperm(len(pools.latents), generator=generator("few order", seed))
        return fitted(pools.votes(order[: keys // 2], taste, seed))
    if way in CHOICES:
        order = asked_about(world, taste, seed, order, keys, CHOICES[way])
    if way in ("early", "late"):
        from_step = order // BATCH % 9 + 2
        order = order[from_step <= 5] if way == "early" else order[from_step >= 7]
    votes = world.votes(order[:keys], taste, seed)
    if way == "ties":
        size = world.differences[taste][order[:keys]].abs()
        votes.answers[size <= size.kthvalue(keys // 8).values] = 0.5
    return fitted(votes, fit_with_variance if way == "variance" else fit_member)


# ---------------------------------------------------------------------------------------------- stages


def missing(
    table: Path, column: str, names: Iterable[str], draws: int
) -> Iterator[tuple[dict[str, str], str, str, int]]:
    """Of each row that `table` lacks its key, the name, the taste and the draw."""
    for seed, taste, name in itertools.product(range(draws), TASTES, names):
        key = {column: name, "taste": taste, "draw": str(seed)}
        if not is_done(table, key):
            yield key, name, taste, seed


def gain_of(
    head: TasteHead, work: Path, output: Path, taste: str, seed: int, changes: Mapping[str, object]
) -> dict[str, float]:
    """What the demo's LoRA gains that follows a head, and the CPU seconds of its training. changes: of the settings."""
    values = {"output": str(output), "preference": "", "seed": seed, "replace": True, **LORA, **changes}
    config = demo_config(work, {**values, "sample_every": 0, "save_every": 0, "validate_every": 0})
    host = load_host(config)
    began = time.process_time()
    with torch.enable_grad():
        train(host, config, read_prompts(config.prompt.prompts), head, Watcher())
    seconds = time.process_time() - began
    return {**judged_lora(work, host, output, taste), "training_seconds": seconds}


def measure_accuracy(work: Path, draws: int) -> None:
    world, held, pools = read_world(work, "votes"), read_world(work, "held_out"), read_bank(work)
    table = work / "few_votes.csv"
    for key, name, taste, seed in missing(table, "head", HEADS, draws):
        began = time.process_time()
        head = head_of(name, world, pools, taste, seed)
        add_row(table, key | judged(head, held, held.differences[taste]), began)


def measure_gain(work: Path, draws: int) -> None:
    world, pools, table = read_world(work, "votes"), read_bank(work), work / "few_votes_gain.csv"
    for key, name, taste, seed in missing(table, "head", TRAINED, draws):
        began = time.process_time()
        output = work / f"gain_{name.replace(' ', '_')}_{taste}_{seed}.safetensors"
        add_row(table, key | gain_of(head_of(name, world, pools, taste, seed), work, output, taste, seed, {}), began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("pools", "accuracy", "gain"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        if options.stage == "pools":
            make_bank(options.work)
        else:
            {"accuracy": measure_accuracy, "gain": measure_gain}[options.stage](options.work, options.draws)


if __name__ == "__main__":
    main()
