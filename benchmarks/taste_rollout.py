"""One prompt's rollout with a taste head against the same with a step-aware CLIP: ratios of time and peak memory.

    python benchmarks/taste_rollout.py [--latent-px 32] [--sampling-steps 4] [--device cpu]

Both sides sample the same pools with the same draws, at SD1.5's layer shapes with random weights.

taste  scores the noisy candidates; the network sees only the candidate that goes on; no VAE, no CLIP in memory
clip   the published way: clean prediction of every candidate, decoded (four at a time), scored by a step-aware CLIP of
       ViT-H/14's shape

Each side runs in a process of its own, so that its peak memory is its own. Times are ratios within one call:
CPU seconds of the process, or seconds of the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIDES = ("taste", "clip")


def peak_bytes(device: str) -> int:
    """Peak memory of this process so far: on the device where there is one, else resident."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def scorer_of(side: str, device: Any) -> tuple[Any, Any]:
    """(preference model, VAE or None) with random weights."""
    from diffusers import AutoencoderKL

    from spo.preference.clip.step_aware import ClipShape, StepAwareCLIP, TowerShape
    from spo.preference.taste.head import TasteFacts, TasteHead, TasteNetwork

    if side == "taste":
        head = TasteHead([TasteNetwork(32) for _ in range(5)], TasteFacts())
        head.members.to(device)
        return head, None
    shape = ClipShape(TowerShape(1024, 4096, 24, 16), TowerShape(1280, 5120, 32, 16), 49408, 14, 224, 1024)
    with device:
        clip = StepAwareCLIP(shape).eval().requires_grad_(False)
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512),
        }
        vae = AutoencoderKL(**blocks, layers_per_block=2, latent_channels=4).eval().requires_grad_(False)
    return clip, vae


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak memory of one side's rollout, and what it evaluated."""
    import torch
    from diffusers import UNet2DConditionModel

    from spo.algorithm.denoiser import Conditioning, GuidedDenoiser
    from spo.algorithm.diffusion import scaled_linear_alphas_cumprod, sigma_ladder
    from spo.algorithm.rollout import RolloutSettings, Scoring, sample_spo
    from spo.headless.host import repeat_conditioning
    from spo.rng import SeededDraws

    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    with device:
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).to(dtype)
        unet.requires_grad_(False).eval()
        text, empty = (Conditioning(torch.randn(1, 77, 768, dtype=dtype)) for _ in range(2))
    preference, vae = scorer_of(side, device)
    alphas = scaled_linear_alphas_cumprod().to(device)
    sigmas = sigma_ladder("ddim", options.sampling_steps, alphas.cpu()).to(device)
    counts = {"evaluations": 0, "decodes": 0}

    def predict(x: Any, timesteps: Any, conditioning: Conditioning) -> Any:
        counts["evaluations"] += len(x)
        return unet(x.to(dtype), timesteps, conditioning.cross_attention).sample

    def decode(latents: Any) -> Any:
        counts["decodes"] += len(latents)
        return torch.cat([vae.decode(part).sample for part in latents.split(4)]).clamp(-1, 1)

    draws = SeededDraws([options.seed])
    start = draws.initial((4, options.latent_px, options.latent_px)).to(device) * sigmas[0]

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # on a CPU that others use too

    began = clock()
    sample_spo(
        GuidedDenoiser(predict, alphas, "epsilon"), start, sigmas,
        {"cond": text, "uncond": empty, "guidance_scale": 5.0},
        settings=RolloutSettings(divert_start_step=options.divert_start_step), draws=draws, alphas_cumprod=alphas,
        scoring=Scoring(preference, ["a cat"], decode), repeat=repeat_conditioning,
    )  # fmt: skip
    return {"seconds": clock() - began, "peak_bytes": peak_bytes(options.device), **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-px", type=int, default=32, help="side of the latent (64 is a picture of 512 pixels)")
    parser.add_argument("--sampling-steps", type=int, default=4)
    parser.add_argument("--divert-start-step", type=int, default=1, help="a fifth of the steps, as published")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    results = {}
    for side in SIDES:
        made = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], capture_output=True, text=True)
        if made.returncode:
            sys.exit(made.stderr)
        results[side] = json.loads(made.stdout.splitlines()[-1])
    report(results, options)


def report(results: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    import diffusers
    import torch

    print(
        f"one prompt, SD1.5's UNet (random weights), latent {options.latent_px} x {options.latent_px}, "
        f"{options.sampling_steps} steps, K = 4 from step {options.divert_start_step}, seed {options.seed}, "
        f"{options.device}\nPython {platform.python_version()}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, {torch.get_num_threads()} threads\n"
    )
    print(f"{'':22}{'taste':>10}{'CLIP':>10}{'ratio':>8}")
    for name, label, scale in (
        ("seconds", "time [s]", 1),
        ("peak_bytes", "peak memory [GiB]", 2**30),
        ("evaluations", "network evaluations", 1),
        ("decodes", "pictures decoded", 1),
    ):
        taste, clip = (results[side][name] / scale for side in SIDES)
        ratio = f"{clip / taste:.2f}" if taste else "-"
        print(f"{label:22}{taste:>10.4g}{clip:>10.4g}{ratio:>8}")


if __name__ == "__main__":
    main()
