"""What fitting a taste head costs at full size, beside the head for small latents, and whether it knows as much.

    OMP_NUM_THREADS=1 python benchmarks/full_size_taste.py --work FOLDER

Cost: CPU seconds of an update and of drawing its noise, both kinds of head, in one run. Accuracy: the demo's pairs
(FOLDER/pairs/votes_*.safetensors, from `simulated_voters.py pairs`), their latents made four times as long by bilinear
interpolation, a rule on the pictures, half of the pairs held out; one member of each kind.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.simulated_voters import load_pairs, true_answers
from spo.algorithm.diffusion import network_input, scaled_linear_alphas_cumprod, training_sigmas
from spo.preference.taste import fit as fitting
from spo.preference.taste.fit import FitSettings, fit_member
from spo.preference.taste.head import TasteNetwork, stride_for
from spo.rng import generator

KINDS = {"small latents' head": lambda latents: 1, "strided head": stride_for}


def fitted(kind: str, latents: Tensor, answers: Tensor, updates: int, member: int = 0) -> tuple[TasteNetwork, float]:
    """A member, and the CPU seconds of an update."""
    fitting.stride_for = KINDS[kind]
    began = time.process_time()
    network = fit_member(latents, answers, FitSettings(updates=updates), member)
    return network, (time.process_time() - began) / updates


@torch.no_grad()
def accuracy(network: TasteNetwork, latents: Tensor, answers: Tensor, timestep: int, noises: int = 4) -> float:
    sigma = training_sigmas(scaled_linear_alphas_cumprod())[timestep].float()
    draw, right = generator("full size", timestep), []
    for _ in range(noises):
        for rows in torch.arange(len(latents)).split(32):
            noisy = (latents[rows] + sigma * torch.randn(latents[rows].shape, generator=draw)).flatten(0, 1)
            both = sigma.expand(len(noisy))
            scores = network(network_input(noisy, both), both).unflatten(0, (-1, 2))
            right.append(((scores[:, 0] > scores[:, 1]).float() == answers[rows]).float())
    return float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for side, updates in ((64, 2), (128, 1)):
        latents, answers = torch.randn(64, 2, 4, side, side), torch.randint(0, 2, (64,)).float()
        for kind in KINDS:
            many = updates * (10 if kind == "strided head" else 1)
            few, more = (fitted(kind, latents, answers, n)[1] * n for n in (1, 1 + many))
            print(
                f"{side:4} {kind:22} {(more - few) / many:.3f} CPU s an update, {few:.2f} s for the first", flush=True
            )
    pairs = load_pairs(options.work, "votes")
    flat = torch.nn.functional.interpolate(pairs["latents"].flatten(0, 1), scale_factor=4, mode="bilinear")
    latents = flat.unflatten(0, (-1, 2))
    half = len(latents) // 2
    for taste in ("colourful", "large"):
        answers = true_answers(taste, pairs["pixels"])
        for kind in KINDS:
            network, seconds = fitted(kind, latents[:half], answers[:half], options.updates)
            shares = [accuracy(network, latents[half:], answers[half:], t) for t in (1, 201, 401, 601)]
            row = {"taste": taste, "head": kind, "votes": half, "held_out": len(latents) - half, "seconds": seconds}
            print(json.dumps({**row, "accuracy": [round(share, 3) for share in shares]}), flush=True)


if __name__ == "__main__":
    main()
