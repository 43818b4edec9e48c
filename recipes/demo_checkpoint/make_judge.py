"""Fit the demo's second judge, which training never sees: finished pictures, labelled by the rule of taste with errors.

    python -m recipes.demo_checkpoint.make_judge --output spo/demo/judge.safetensors

It shares nothing with the preference model that the demo trains on (make_preference.py) but the rule: its pictures
show the subjects that are neither training nor held-out prompts, from other seeds; it sees pixels, not latents; and one
label in eight is wrong, as people's are. Half of the pictures are made duller or more vivid first, beyond what the
checkpoint draws by itself, so that it can judge a LoRA's.

Prints the accuracy on pairs of held-out prompts, which also goes into the file's metadata.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from recipes.demo_checkpoint.pictures import saturate
from spo.demo.judge import HERE, held_out
from spo.demo.rule import colourfulness
from spo.demo.run import demo_config
from spo.demo.subjects import load as load_classifier
from spo.headless.compare import pictures
from spo.headless.host import HeadlessHost, load_host
from spo.preference.cnn_file import save_cnn
from spo.preference.pixel_cnn import PixelCNN
from spo.prompts import read_prompts
from spo.rng import generator, stable_seed

WRONG_LABELS = 1 / 8
BATCH = 32  # pairs


def unused_subjects() -> list[str]:
    """What the checkpoint can draw and the demonstration never asks for, neither in training nor in judging."""
    classes = load_classifier(HERE / "subject_classifier.safetensors").classes
    used = {*read_prompts(str(HERE / "prompts.txt")), *held_out()[0]}
    return [name for name in classes if name not in used]


def sample(host: HeadlessHost, prompts: list[str], seeds_each: int, position: str) -> Tensor:
    """[prompts, seeds_each, 3, 64, 64] in [-1, 1]: plain samples of the checkpoint, from seeds of this recipe's own."""
    rows = [(prompt, stable_seed("demo-judge", position, n)) for prompt in prompts for n in range(seeds_each)]
    host.prepare(prompts)
    made = pictures(host, [prompt for prompt, _ in rows], [seed for _, seed in rows], eta=1.0, batch=32)
    return made.unflatten(0, (len(prompts), seeds_each))


def fit(pixels: Tensor, steps: int, seed: int) -> PixelCNN:
    """`steps` updates on pairs of [P, S, 3, H, W] pictures, half of them of one prompt; the label's error is a pair's
    own for good, drawn once: the same pair is not right the one time and wrong the other."""
    torch.manual_seed(seed)
    network, draws = PixelCNN(), generator("demo-judge", "pairs", seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    seeds_each = pixels.shape[1]
    flat = pixels.flatten(0, 1)
    changed = torch.rand(len(flat), generator=draws) < 0.5
    strength = 0.4 + 1.4 * torch.rand(len(flat), generator=draws)
    flat = saturate(flat, torch.where(changed, strength, torch.ones(len(flat))))
    taste = colourfulness(flat)
    wrong = torch.rand(len(flat), len(flat), generator=draws) < WRONG_LABELS
    for step in range(steps):
        first = torch.randint(len(flat), (BATCH,), generator=draws)
        anywhere = torch.randint(len(flat), (BATCH,), generator=draws)
        alike = first // seeds_each * seeds_each + torch.randint(seeds_each, (BATCH,), generator=draws)
        second = torch.where(torch.rand(BATCH, generator=draws) < 0.5, alike, anywhere)
        first, second = torch.minimum(first, second), torch.maximum(first, second)
        label = (taste[first] > taste[second]) ^ wrong[first, second]
        scores = network(flat[torch.cat([first, second])])
        apart = (first != second).float()
        loss = binary_cross_entropy_with_logits(scores[:BATCH] - scores[BATCH:], label.float(), weight=apart)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 99:
            print(f"update {step + 1}: loss {float(loss.detach()):.3f}", flush=True)
    return network.eval()


@torch.no_grad()
def accuracy(network: PixelCNN, pixels: Tensor) -> float:
    """Share of pairs of one prompt in [P, S, 3, H, W] whose order by the rule the network gets right."""
    scores = network(pixels.flatten(0, 1)).view(pixels.shape[:2])
    taste = colourfulness(pixels.flatten(0, 1)).view(pixels.shape[:2])
    first, second = torch.triu_indices(pixels.shape[1], pixels.shape[1], 1)
    right = (scores[:, first] > scores[:, second]) == (taste[:, first] > taste[:, second])
    return float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", help="default: the demo checkpoint")
    parser.add_argument("--seeds-each", type=int, default=16, help="pictures of each of the subjects")
    parser.add_argument("--updates", type=int, default=800)
    arguments = parser.parse_args()
    host = load_host(demo_config(Path("."), {"checkpoint": arguments.checkpoint} if arguments.checkpoint else {}))
    subjects = unused_subjects()
    print(f"{len(subjects)} subjects, {arguments.seeds_each} pictures each", flush=True)
    network = fit(sample(host, subjects, arguments.seeds_each, "fit"), arguments.updates, seed=1)
    measured = accuracy(network, sample(host, list(dict.fromkeys(held_out()[0])), 6, "held out"))
    print(f"accuracy on pairs of held-out prompts: {measured:.3f}")
    facts = {"name": "demo-judge", "rule": "colourfulness", "held_out_accuracy": f"{measured:.3f}"}
    save_cnn(network, arguments.output, facts)


if __name__ == "__main__":
    main()
