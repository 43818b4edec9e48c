"""SPO on one prompt at full width, phase by phase: the published order of work against ours and its shortcuts.

    python benchmarks/full_size_order.py --work FOLDER [--latent-px 32] [--sampling-steps 6] [--device cpu]

Networks of SD1.5's shapes (UNet 0.86 billion parameters, VAE) and the step-aware CLIP's (ViT-H/14, 1.31 billion), with
random weights; a picture is 8 times as wide as its latent. Every side samples the same pools from the same draws and
makes one update on each batch of pairs.

published   a transcription of the published order: the reference is a deep copy of the network, policy and reference
            are each run on the win and on the lose side; the scorer, in float32, runs its text tower and the time
            modulation for every candidate; every candidate is decoded in full
exact       ours, results unchanged: one evaluation for both sides of a pair; the reference is the network, adapter off;
            texts and modulation once for each prompt and timestep
small       exact, and `small_decode`: latents brought down to the scorer's 224 pixels before decoding
half        exact, and the scorer's picture tower in half precision (bfloat16 on a CPU)
small half  both
head        a taste head on the noisy latents in the scorer's place: no prediction of losing candidates, no decoder

Phases: rollout (the network), decode, scoring, training. Time is CPU time of the process (on a GPU: wall time, with the
device in step); memory is the largest resident size within a phase (on a GPU: allocated), weights included. Each side
runs in a process of its own and leaves FOLDER/SIDE_....json; sides that have one are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import peft
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from spo.algorithm.denoiser import Conditioning, GuidedDenoiser
from spo.algorithm.diffusion import (
    ancestral_step,
    scaled_linear_alphas_cumprod,
    sigma_ladder,
    transition_log_density,
    transition_mean,
)
from spo.algorithm.objective import pair_loss, spo_loss
from spo.algorithm.pairs import Pairs
from spo.algorithm.preference import Candidates, PreferenceModel
from spo.algorithm.rollout import RolloutSettings, Scoring, sample_spo
from spo.files import write_text
from spo.headless.host import repeat_conditioning
from spo.lora.adapter import Adapter, modules_of_kinds
from spo.preference.clip.step_aware import ClipShape, StepAwareCLIP, TowerShape
from spo.preference.clip.towers import settle, token_ids
from spo.preference.placement import Placement
from spo.preference.small_decode import SCORER_PX, shrunk
from spo.preference.taste.head import TasteFacts, TasteHead, TasteNetwork
from spo.report.tables import table
from spo.rng import SeededDraws

SIDES = ("published", "exact", "small", "half", "small half", "head")
PHASES = ("rollout", "decode", "scoring", "training")
PROMPT = "a photo of a red apple on a wooden table"
VIT_H = ClipShape(TowerShape(1024, 4096, 24, 16), TowerShape(1280, 5120, 32, 16), 49408, 14, 224, 1024)
CFG = 5.0


class Phases:
    """What each phase costs; one phase inside another interrupts it. seconds, peak_bytes: by phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.peak_bytes = dict.fromkeys(PHASES, 0)
        self._active: list[str] = []
        self._since = 0.0

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """Everything in the block is this phase's."""
        self._account()
        self._active.append(phase)
        try:
            yield
        finally:
            self._account()
            self._active.pop()

    def _account(self) -> None:
        """Put what was spent since the last call on the active phase."""
        now, peak = self._clock(), self._peak_since_reset()
        if self._active:
            phase = self._active[-1]
            self.seconds[phase] += now - self._since
            self.peak_bytes[phase] = max(self.peak_bytes[phase], peak)
        self._since = self._clock()

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # on a CPU that others use too

    def _peak_since_reset(self) -> int:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins anew
        return 1024 * int(match[1]) if match else 0


@cache
def normal_numbers() -> Tensor:
    """[2^22] of the standard normal distribution; drawing a billion takes a minute."""
    return torch.randn(2**22)


def random_values(shape: Sequence[int], dtype: torch.dtype, deviation: float) -> Tensor:
    """A tensor of normal numbers, the same ones over and over."""
    values = torch.empty(tuple(shape), dtype=dtype)
    flat = values.view(-1)
    numbers = (normal_numbers()[: len(flat)] * deviation).to(dtype)
    for part in flat.split(len(numbers)):
        part.copy_(numbers[: len(part)])
    return values


def with_random_weights(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A network on the meta device gets weights of its fresh layers' scale: norms 1 and 0, matrices by their inputs."""
    weights = {}
    for name, value in network.state_dict().items():
        if value.ndim > 1:
            weights[name] = random_values(value.shape, dtype, (3 * math.prod(value.shape[1:])) ** -0.5).to(device)
        else:
            weights[name] = torch.full(value.shape, float(name.endswith("weight")), dtype=dtype, device=device)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def random_clip(place: Placement, published: bool) -> StepAwareCLIP:
    """The step-aware CLIP at full size with random weights, placed as the product places it, or all in float32."""
    with torch.device("meta"):
        model = StepAwareCLIP(VIT_H)

    def stays(name: str) -> bool:
        once = name.startswith(("text_model.", "text_projection.", "t_embedder.")) or ".adaLN_modulation." in name
        return once and not published

    tensors = {
        name: random_values(value.shape, place.dtype if stays(name) else torch.float32, 0.02)
        for name, value in model.state_dict().items()
    }
    settle(model, tensors, place, stays)
    return model


class PublishedScorer:
    """A step-aware CLIP used as the published code does: text and time once for every candidate."""

    name, needs_pixels, needs_denoised = "published", True, True

    def __init__(self, model: StepAwareCLIP) -> None:
        self.model = model

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B]; see `PreferenceModel`."""
        pixels = candidates.pixels()
        count, images = pixels.shape[:2]
        texts = self.model.text_features(token_ids([*prompts] * count))
        timesteps = torch.full((count * images,), candidates.timestep, device=pixels.device)
        pictures = self.model.image_features(pixels.flatten(0, 1), timesteps)
        return (self.model.logit_scale.exp() * (pictures * texts).sum(-1)).unflatten(0, (count, images))


class SmallPictures:
    """Hands another preference model pictures of its own size: `SmallDecode` without its check against the full one."""

    name, needs_pixels, needs_denoised = "small", True, True

    def __init__(self, model: PreferenceModel) -> None:
        self.model = model

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B]; see `PreferenceModel`."""
        small = replace(candidates, decode=lambda latents: candidates.decode(shrunk(latents, SCORER_PX)))
        return self.model.score(small, prompts)


class Timed:
    """A preference model whose work is the phase "scoring"."""

    def __init__(self, model: PreferenceModel, phases: Phases) -> None:
        self.model, self.phases = model, phases
        self.name, self.needs_pixels, self.needs_denoised = model.name, model.needs_pixels, model.needs_denoised

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B]; see `PreferenceModel`."""
        with self.phases.inside("scoring"):
            return self.model.score(candidates, prompts)


def scorer_of(side: str, device: torch.device) -> PreferenceModel:
    """The side's preference model, with random weights."""
    if side == "head":
        head = TasteHead([TasteNetwork(32) for _ in range(5)], TasteFacts())
        head.members.to(device)
        return head
    half = torch.bfloat16 if device.type == "cpu" else torch.float16
    clip = random_clip(Placement(device, half if "half" in side else torch.float32), side == "published")
    if side == "published":
        return PublishedScorer(clip)
    return SmallPictures(clip) if "small" in side else clip


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side's rollout and training: seconds and peak memory by phase, what was evaluated, the pairs."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
    del vae.encoder
    unet, vae = (with_random_weights(network, device, dtype) for network in (unet, vae))
    text, empty = (Conditioning(torch.randn(1, 77, 768).to(device, dtype)) for _ in range(2))
    preference = scorer_of(side, device)
    if not preference.needs_pixels:
        vae = None
    adapter = Adapter(unet, modules_of_kinds(unet, ["attention"]), rank=4, alpha=4, seed=options.seed)
    copied = copy.deepcopy(unet) if side == "published" else None

    phases = Phases(device)
    counts = {"evaluations": 0, "decoded": 0}
    alphas = scaled_linear_alphas_cumprod().to(device)
    sigmas = sigma_ladder("ddim", options.sampling_steps, alphas.cpu()).to(device)

    def denoiser_of(network: Any) -> GuidedDenoiser:
        def predict(x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
            counts["evaluations"] += len(x)
            return network(x.to(dtype), timesteps, conditioning.cross_attention).sample

        return GuidedDenoiser(predict, alphas, "epsilon")

    def decode(latents: Tensor) -> Tensor:
        with phases.inside("decode"):
            counts["decoded"] += len(latents)
            parts = [vae.decode(part.to(dtype) / vae.config.scaling_factor).sample for part in latents.split(1)]
            return torch.cat(parts).float().clamp(-1, 1)

    policy = denoiser_of(unet)
    draws = SeededDraws([options.seed])
    start = draws.initial((4, options.latent_px, options.latent_px)).to(device) * sigmas[0]
    settings = RolloutSettings(
        divert_start_step=options.divert_start_step, timestep_min=options.timestep_min, threshold=0.0
    )
    with phases.inside("rollout"):
        rolled = sample_spo(
            policy, start, sigmas, {"cond": text, "uncond": empty, "guidance_scale": CFG},
            settings=settings, draws=draws, alphas_cumprod=alphas, repeat=repeat_conditioning,
            scoring=Scoring(Timed(preference, phases), [PROMPT], decode),
        )  # fmt: skip
    assert rolled.pairs is not None
    in_rollout = counts["evaluations"]

    loss = partial(spo_loss, beta=10.0, ratio_clamp=0.1)
    gradient = gradient_of_published if side == "published" else gradient_of_ours
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=6e-5)
    losses = []
    with phases.inside("training"):
        for rows in torch.arange(len(rolled.pairs)).split(options.pairs_per_update):
            pairs = rolled.pairs.rows(rows)
            count = len(pairs)
            arguments = {"cond": text.repeat(count), "uncond": empty.repeat(count), "guidance_scale": CFG}
            optimizer.zero_grad(set_to_none=True)
            reference = denoiser_of(copied) if copied is not None else policy
            losses.append(gradient(policy, reference, adapter, pairs, arguments, loss))
            optimizer.step()
    return {
        "seconds": phases.seconds,
        "peak_bytes": phases.peak_bytes,
        "rollout_evaluations": in_rollout,
        "training_evaluations": counts["evaluations"] - in_rollout,
        "decoded": counts["decoded"],
        "pairs": len(rolled.pairs),
        "last_loss": losses[-1],
        "threads": torch.get_num_threads(),
    }


def gradient_of_ours(
    policy: Callable[..., Tensor], reference: Callable[..., Tensor], adapter: Adapter, pairs: Pairs,
    arguments: dict[str, Any], loss: Callable[..., Any],
) -> float:  # fmt: skip
    """The product's own `pair_loss`, and its backward pass; the mean loss."""

    def adapter_on(x: Tensor, sigma: Tensor, image: Tensor, step: Tensor) -> Tensor:
        return policy(x, sigma, **arguments)

    def adapter_off(x: Tensor, sigma: Tensor, image: Tensor, step: Tensor) -> Tensor:
        with adapter.reference():
            return reference(x, sigma, **arguments)

    mean = pair_loss(adapter_on, adapter_off, pairs, loss).loss.mean()
    mean.backward()
    return float(mean.detach())


def gradient_of_published(
    policy: Callable[..., Tensor], reference: Callable[..., Tensor], adapter: Adapter, pairs: Pairs,
    arguments: dict[str, Any], loss: Callable[..., Any],
) -> float:  # fmt: skip
    """Policy and reference on the win side, then on the lose side, and the backward pass; the mean loss."""
    noise = ancestral_step(pairs.sigma, pairs.sigma_next, 1.0)

    def log_density(denoiser: Callable[..., Tensor], x: Tensor, x_next: Tensor) -> Tensor:
        mean = transition_mean(x, denoiser(x, pairs.sigma, **arguments), pairs.sigma, noise.down)
        return transition_log_density(x_next, mean, noise.up)

    ratios = []
    for x, x_next in ((pairs.x_win, pairs.next_win), (pairs.x_lose, pairs.next_lose)):
        with torch.no_grad():
            expected = log_density(reference, x, x_next)
        ratios.append(log_density(policy, x, x_next) - expected)
    mean = loss(*ratios).loss.mean()
    mean.backward()
    return float(mean.detach())


def result_path(side: str, options: argparse.Namespace) -> Path:
    """Where a side's numbers are; another name for other options."""
    names = ("latent_px", "sampling_steps", "divert_start_step", "timestep_min", "pairs_per_update", "seed", "device")
    return options.work / f"{'_'.join([side, *(str(getattr(options, name)) for name in names)]).replace(' ', '_')}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the sides' numbers")
    parser.add_argument("--latent-px", type=int, default=32, help="side of the latent (64 is a picture of 512 pixels)")
    parser.add_argument("--sampling-steps", type=int, default=6)
    parser.add_argument("--divert-start-step", type=int, default=1, help="first step that draws a pool")
    parser.add_argument("--timestep-min", type=int, default=0, help="no pool below; 2 leaves out the last step's")
    parser.add_argument("--pairs-per-update", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.side:
        numbers = measure(options.side, options)
        write_text(result_path(options.side, options), json.dumps(numbers, indent=1) + "\n")
        return
    for side in options.sides:
        if not result_path(side, options).exists():
            print(f"{side} ...", flush=True)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True)
    print(report(options))


def report(options: argparse.Namespace) -> str:
    """Two tables: seconds and memory by phase, each with its ratio to the published order."""
    results = {side: json.loads(result_path(side, options).read_text()) for side in options.sides}
    first = results.get("published", next(iter(results.values())))
    threads = first["threads"]
    size = options.latent_px
    lines = [
        f"One prompt, SD1.5's UNet and VAE and ViT-H/14 with random weights, latent {size} x {size} (picture "
        f"{8 * size} px), {options.sampling_steps} steps, K = 4 from step {options.divert_start_step}, "
        f"{first['pairs']} pairs, {options.pairs_per_update} an update, seed {options.seed}, {options.device}, "
        f"{threads} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, peft {peft.__version__}."
    ]
    for key, unit, scale, whole in (("seconds", "s", 1, sum), ("peak_bytes", "GiB", 2**30, max)):
        rows = []
        for side, numbers in results.items():
            values = [numbers[key][phase] for phase in PHASES]
            bases = [first[key][phase] for phase in PHASES]
            pairs = zip([*values, whole(values)], [*bases, whole(bases)], strict=True)
            rows.append([side, *(f"{ours / scale:.2f} ({ours / base:.2f})" if base else "-" for ours, base in pairs)])
        lines.append(table(rows, [f"{unit} (ratio)", *PHASES, "in all" if whole is sum else "most"], markdown=True))
    counts = ("rollout_evaluations", "training_evaluations", "decoded", "pairs", "last_loss")
    rows = [[side, *(numbers[name] for name in counts)] for side, numbers in results.items()]
    lines.append(table(rows, ["", *(name.replace("_", " ") for name in counts)], markdown=True))
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
