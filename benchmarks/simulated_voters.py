"""Simulated voters on the demo checkpoint: how many votes a taste needs, and whether SPO then follows it.

    python benchmarks/simulated_voters.py STAGE --work FOLDER

Voters follow a rule that can be computed on the finished pictures, with 10 % of their answers flipped; training never
sees the rule. Three tastes, of which the second contradicts the first:

    colourful   Hasler and Suesstrunk's colourfulness (spo/demo/rule.py)
    grey        the same, less is better
    large       the share of the picture that the subject covers

Stages, in order; each keeps what it has in FOLDER and goes on from there:

    pairs     make the pairs: 800 to vote on (the demo's prompts), 400 held out (its held-out prompts)
    features  add noise to them (8 times at random levels; held-out ones once at each shown level), and keep what other
              heads than the taste head look at: the UNet's pooled features, and a vision network's of the decoded
              clean prediction
    inputs    accuracy by what a head reads, with 200 and 800 votes
    votes     accuracy by number of votes, for the taste head and the CLIP-style head
    train     SPO with each head for each taste, and the rule's judgement
    rollout   time and memory of a rollout with the taste head, and with decoding and a step-aware CLIP of ViT-H's shape
    report    docs/taste*.csv and the pictures, from what the other stages left

The CLIP-style head stands in for a step-aware CLIP, whose weights are not at hand: a frozen network that was trained on
pictures of this kind (the demo's subject classifier: all six layers, means and deviations over the picture) looks at
the decoded clean prediction, and a small head on top, told the noise level, is fitted to the same votes by the same
recipe. So it needs the denoiser and the VAE for each candidate, as the published preference model does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.demo.judge import HERE, held_out
from spo.demo.run import demo_config
from spo.demo.subjects import load as load_classifier
from spo.diffusion import training_sigmas
from spo.files import write_whole
from spo.headless import load_host
from spo.preference.vote_pairs import make_pairs
from spo.prompts import read_prompts
from spo.rng import generator, stable_seed

BATCH = 16
NOISINGS = 8  # of each pair to vote on, for heads whose inputs are slow to make
TIMESTEPS = (1, 201, 401, 601)  # where held-out pairs are judged
PAIRS = {"votes": 800, "held_out": 400}


def pair_prompts(part: str) -> list[str]:
    """The prompt of each pair."""
    prompts = read_prompts(str(HERE / "prompts.txt")) if part == "votes" else list(dict.fromkeys(held_out()[0]))
    order = [prompts[stable_seed(part, number) % len(prompts)] for number in range(PAIRS[part])]
    return order


def make_all_pairs(work: Path) -> None:
    """FOLDER/pairs/PART_BATCH.safetensors: latents [16, 2, 4, 8, 8], pixels [16, 2, 3, 64, 64] uint8."""
    folder = work / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    host = load_host(demo_config(work))
    for part in PAIRS:
        told = pair_prompts(part)
        host.prepare(told)
        for first in range(0, len(told), BATCH):
            path = folder / f"{part}_{first:04d}.safetensors"
            if path.exists():
                continue
            some = told[first : first + BATCH]
            from_step = 2 + first // BATCH % 9
            made = make_pairs(host, some, [stable_seed(part, first + n) % 2**32 for n in range(len(some))], from_step)
            tensors = {
                "latents": torch.stack([pair.latents for pair in made]),
                "pixels": torch.stack([((pair.pixels + 1) * 127.5).round().byte() for pair in made]).contiguous(),
            }
            write_whole(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))
            print(path.name, flush=True)


# ---------------------------------------------------------------------------------------------- what heads look at


class UNetFeatures:
    """Pooled outputs of a diffusers UNet's down and mid blocks at its latest call, of the guided half of the batch."""

    def __init__(self, network: Any) -> None:
        self.parts: list[Tensor] = []
        for block in [*network.down_blocks, network.mid_block]:
            block.register_forward_hook(self._keep)

    def _keep(self, block: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        guided = hidden[len(hidden) // 2 :]
        self.parts += [guided.mean((2, 3)), guided.flatten(2).std(2)]

    def take(self) -> Tensor:
        """[N, 640]; forgets them."""
        features, self.parts = torch.cat(self.parts, 1), []
        return features


class VisionFeatures:
    """Means and deviations over the picture of every layer of the demo's subject classifier: [N, 1152]."""

    def __init__(self) -> None:
        self.network = load_classifier(HERE / "subject_classifier.safetensors").network

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        parts = []
        for layer in self.network.features:
            pixels = layer(pixels)
            parts += [pixels.mean((2, 3)), pixels.flatten(2).std(2)]
        return torch.cat(parts, 1)


def load_pairs(work: Path, part: str) -> dict[str, Tensor]:
    """All pairs of a part: latents [N, 2, 4, 8, 8], pixels [N, 2, 3, 64, 64] uint8."""
    files = [load_file(path) for path in sorted((work / "pairs").glob(f"{part}_*.safetensors"))]
    return {name: torch.cat([file[name] for file in files]) for name in files[0]}


def make_features(work: Path) -> None:
    """FOLDER/features/PART_NUMBER.safetensors: sigma [N], x [N, 2, 4, 8, 8], unet [N, 2, 640], vision [N, 2, 1152]."""
    folder = work / "features"
    folder.mkdir(parents=True, exist_ok=True)
    host, vision = load_host(demo_config(work)), VisionFeatures()
    unet = UNetFeatures(host.network)
    sigmas = training_sigmas(host.alphas_cumprod).float()
    for part in PAIRS:
        clean, told = load_pairs(work, part)["latents"], pair_prompts(part)
        host.prepare(told)
        for number in range(NOISINGS if part == "votes" else len(TIMESTEPS)):
            path = folder / f"{part}_{number}.safetensors"
            if path.exists():
                continue
            draw = generator("noise", part, number)
            timesteps = torch.randint(0, 901, (len(clean),), generator=draw)
            if part == "held_out":
                timesteps = torch.full((len(clean),), TIMESTEPS[number])
            sigma = sigmas[timesteps]
            x = clean + sigma[:, None, None, None, None] * torch.randn(clean.shape, generator=draw)
            kept: dict[str, list[Tensor]] = {"unet": [], "vision": []}
            for rows in torch.arange(len(clean)).split(32):
                both = [told[row] for row in rows.tolist() for _ in range(2)]
                denoised = host.denoiser(
                    x[rows].flatten(0, 1), sigma[rows].repeat_interleave(2), **host.arguments(both)
                )
                kept["unet"].append(unet.take())
                kept["vision"].append(vision(host.decode(denoised)))
            features = {name: torch.cat(parts).unflatten(0, (-1, 2)) for name, parts in kept.items()}
            tensors = {"x": x, "sigma": sigma, **features}
            write_whole(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))
            print(path.name, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        STAGES[options.stage](options.work)


STAGES = {"pairs": make_all_pairs, "features": make_features}


if __name__ == "__main__":
    main()
