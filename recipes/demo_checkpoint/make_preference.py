"""Fit the demo's preference model to pairs that the rule of taste labelled, by the paper's recipe.

    python -m recipes.demo_checkpoint.make_preference --output spo/demo/preference.safetensors --groups 400
        [--rule sharpness] [--seen finished] [--groups-file FILE]

1. Sample groups of pictures from the demo checkpoint that share their first steps, as SPO's candidates do.
2. Label every pair of a group by the rule (spo/demo/rule.py), on the finished pictures.
3. For each pair add the same noise to both at a timestep drawn uniformly, take the guided clean prediction, and fit
   the scores by the pairwise cross-entropy. (Paper, section 3.1, but for the network: no CLIP, no decoder.)

For comparison, --seen finished: a scorer of finished pictures, that was told no time and saw no noise; --seen noisy:
one of the noisy latents themselves, each with its own noise, in the variance-preserving form.

Prints the accuracy on pairs of held-out prompts by timestep, which also goes into the file's metadata.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from spo.algorithm.denoiser import GuidedDenoiser
from spo.algorithm.diffusion import training_sigmas
from spo.algorithm.rollout import RolloutSettings, sample_spo
from spo.demo.judge import held_out
from spo.demo.rule import RULES
from spo.demo.run import demo_config
from spo.files import write_whole
from spo.headless.host import HeadlessHost, load_host
from spo.preference.cnn_file import save_cnn
from spo.preference.latent_cnn import LatentCNN
from spo.prompts import read_prompts
from spo.rng import SeededDraws, generator, permutation, stable_seed

GROUP = 4  # pictures that share their first steps
MEASURED_TIMESTEPS = (0, 251, 501, 701)
SEEN = ("predicted", "finished", "noisy")


@dataclass(frozen=True)
class Groups:
    """clean [G, GROUP, 4, h, w] finished latents; taste [G, GROUP] the rule's value; prompts: one a group."""

    clean: Tensor
    taste: Tensor
    prompts: list[str]


class BranchingDraws:
    """Noise that candidates of a group share until step `branch`, and have each their own from then on."""

    def __init__(self, group_seeds: list[int], branches: list[int]) -> None:
        self.shared = SeededDraws([seed for seed in group_seeds for _ in range(GROUP)])
        own = [stable_seed(seed, "own", k) for seed in group_seeds for k in range(GROUP)]
        self.own = SeededDraws(own)
        self.branches = torch.tensor([branch for branch in branches for _ in range(GROUP)])

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return self.shared.initial(shape)

    def noise(self, step: int, candidates: int, like: Tensor) -> Tensor:
        own = (self.branches <= step)[None, :, None, None, None]
        return torch.where(own, self.own.noise(step, candidates, like), self.shared.noise(step, candidates, like))

    def parents(self, step: int, candidates: int) -> Tensor:
        raise AssertionError("plain sampling chooses no parents")


def sample_groups(host: HeadlessHost, prompts: list[str], count: int, seed: int, batch: int = 16) -> Tensor:
    """Finished latents [count, GROUP, 4, 8, 8] over the prompts in turn, branching after 2 to 12 of the 20 steps."""
    latents = []
    for first in range(0, count, batch):
        numbers = range(first, min(first + batch, count))
        branches = [2 + stable_seed(seed, "branch", number) % 11 for number in numbers]
        draws = BranchingDraws([stable_seed(seed, "group", number) for number in numbers], branches)
        arguments = host.arguments([prompts[number % len(prompts)] for number in numbers for _ in range(GROUP)])
        start = draws.initial((4, 8, 8)) * (1 + host.sigmas[0] ** 2).sqrt()
        finished = sample_spo(
            host.denoiser, start, host.sigmas, arguments,
            settings=RolloutSettings(candidates=1), draws=draws, alphas_cumprod=host.alphas_cumprod,
        ).x  # fmt: skip
        latents.append(finished)
    return torch.cat(latents).unflatten(0, (-1, GROUP))


def labelled(host: HeadlessHost, clean: Tensor, prompts: list[str], rule: str) -> Groups:
    """Groups of `sample_groups` with what a rule, one of RULES, says of their pictures."""
    taste = torch.stack([RULES[rule](host.decode(group)) for group in clean])
    return Groups(clean, taste, [prompts[number % len(prompts)] for number in range(len(clean))])


@torch.no_grad()
def clean_predictions(host: HeadlessHost, groups: Groups, timestep: Tensor, position: tuple[int | str, ...]) -> Tensor:
    """[G, GROUP, 4, h, w] guided clean predictions after adding the same noise to all of a group; timestep [G]."""
    denoiser: GuidedDenoiser = host.denoiser
    sigma = training_sigmas(host.alphas_cumprod)[timestep]
    noise = torch.randn(len(timestep), 1, *groups.clean.shape[2:], generator=generator(*position))
    x = groups.clean + sigma.float()[:, None, None, None, None] * noise
    prompts = [prompt for prompt in groups.prompts for _ in range(GROUP)]
    flat_sigma = sigma.float().repeat_interleave(GROUP)
    return denoiser(x.flatten(0, 1), flat_sigma, **host.arguments(prompts)).unflatten(0, (-1, GROUP))


@torch.no_grad()
def seen_latents(
    host: HeadlessHost, groups: Groups, timestep: Tensor, position: tuple[int | str, ...], seen: str
) -> tuple[Tensor, Tensor]:
    """What a scorer of that kind (`SEEN`) looks at, [G, GROUP, 4, h, w], and the timesteps [G] that it is told."""
    if seen == "finished":
        return groups.clean, torch.zeros_like(timestep)
    if seen == "predicted":
        return clean_predictions(host, groups, timestep, position), timestep
    kept = host.alphas_cumprod[timestep].float()[:, None, None, None, None]
    noise = torch.randn(groups.clean.shape, generator=generator(*position))
    return kept.sqrt() * groups.clean + (1 - kept).sqrt() * noise, timestep


def pairwise(scores: Tensor, taste: Tensor) -> tuple[Tensor, Tensor]:
    """Score differences and labels of all pairs of every group, [G * GROUP * (GROUP - 1) / 2] each."""
    first, second = torch.triu_indices(GROUP, GROUP, 1)
    difference = scores[:, first] - scores[:, second]
    return difference.flatten(), (taste[:, first] > taste[:, second]).float().flatten()


def across(scores: Tensor, taste: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """The same for pairs of pictures of different prompts, at different timesteps: group g with group g + shift."""
    label = (taste > taste.roll(shift, 0)).float()
    return (scores - scores.roll(shift, 0)).flatten(), label.flatten()


def accuracy(network: LatentCNN, host: HeadlessHost, groups: Groups, timestep: int, seen: str = "predicted") -> float:
    """Share of pairs whose order the network gets right at one timestep; at 0 on the finished latents.

    A scorer of finished pictures is shown the clean predictions, which is what it would look at in a rollout.
    """
    timesteps, latents = torch.full((len(groups.prompts),), timestep), groups.clean
    if timestep:
        shown = "noisy" if seen == "noisy" else "predicted"
        latents, _ = seen_latents(host, groups, timesteps, ("accuracy", timestep), shown)
    told = torch.zeros_like(timesteps) if seen == "finished" else timesteps
    with torch.no_grad():
        scores = network(latents.flatten(0, 1), told.repeat_interleave(GROUP)).unflatten(0, (-1, GROUP))
    difference, label = pairwise(scores, groups.taste)
    return float(((difference > 0).float() == label).float().mean())


def fit(host: HeadlessHost, groups: Groups, epochs: int, noises: int, seed: int, seen: str = "predicted") -> LatentCNN:
    """Fit on `noises` noisings of each group, drawn once; `epochs` passes over them. Noisy latents, whose noise costs
    nothing, are drawn anew in each pass: a scorer would learn the noise by heart."""
    torch.manual_seed(seed)
    network = LatentCNN()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * noises)
    drawn = [torch.randint(0, 900, (len(groups.prompts),), generator=generator(seed, "t", n)) for n in range(noises)]
    fixed = []
    if seen != "noisy":
        fixed = [seen_latents(host, groups, t, (seed, "noise", n), seen) for n, t in enumerate(drawn)]
        print(f"{noises} noisings of {len(groups.prompts)} groups are ready", flush=True)
    for epoch in range(epochs):
        losses = []
        for n in permutation(noises, seed, "order", epoch):
            anew = (seed, "noise", n, epoch)
            latents, told = fixed[n] if fixed else seen_latents(host, groups, drawn[n], anew, seen)
            scores = network(latents.flatten(0, 1), told.repeat_interleave(GROUP)).unflatten(0, (-1, GROUP))
            loss = binary_cross_entropy_with_logits(*pairwise(scores, groups.taste))
            shift = 1 + stable_seed(seed, "shift", epoch, n) % (len(groups.prompts) - 1)
            loss = loss + binary_cross_entropy_with_logits(*across(scores, groups.taste, shift))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", help="default: the demo checkpoint")
    parser.add_argument("--rule", choices=RULES, default="colourfulness")
    parser.add_argument("--seen", choices=SEEN, default="predicted", help="what the scorer looks at")
    parser.add_argument("--groups", type=int, default=768)
    parser.add_argument("--groups-file", type=Path, help="sampled latents: read where it is there, else written")
    parser.add_argument("--noises", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    changes = {"checkpoint": arguments.checkpoint} if arguments.checkpoint else {}
    config = demo_config(Path("."), changes)
    host = load_host(config)
    prompts, held = read_prompts(config.prompt.prompts), list(dict.fromkeys(held_out()[0]))
    host.prepare([*prompts, *held])
    kept: Path | None = arguments.groups_file
    if kept is not None and kept.exists():
        latents = load_file(kept)
    else:
        latents = {
            "fitted": sample_groups(host, prompts, arguments.groups, seed=1),
            "held_out": sample_groups(host, held, 96, seed=2),
        }
        if kept is not None:
            write_whole(kept, lambda temporary: save_file(latents, temporary))
    groups = labelled(host, latents["fitted"], prompts, arguments.rule)
    network = fit(host, groups, arguments.epochs, arguments.noises, 1, arguments.seen)
    test = labelled(host, latents["held_out"], held, arguments.rule)
    table = {str(t): round(accuracy(network, host, test, t, arguments.seen), 3) for t in MEASURED_TIMESTEPS}
    print("accuracy on held-out pairs by timestep:", table)
    facts = {"name": "demo", "architecture": "sd15", "rule": arguments.rule, "held_out_accuracy": json.dumps(table)}
    save_cnn(network, arguments.output, facts)


if __name__ == "__main__":
    main()
