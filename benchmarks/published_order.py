"""One prompt, our order of work against the published one, at SD1.5's layer shapes: ratios of time and peak memory.

    python benchmarks/published_order.py [--latent-px 8] [--sampling-steps 20] [--device cpu]

Both sides sample the same pools with random weights and the same draws, choose the same pairs by the same scores (the
mean of a channel of the predicted clean latent), and make one update on each batch of pairs.

ours       sample_spo and pair_loss themselves: one policy and one reference evaluation for a pair; the reference is the
           network, adapter off
published  as in full_size_order.py: the reference is a deep copy of the network; policy and reference are
           each run on the win and on the lose side, although both start from the same latent

Each side runs in a process of its own, so that its peak memory is its own. Times are ratios within one call.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIDES = ("ours", "published")


def peak_bytes(device: str) -> int:
    """Peak memory of this process so far: on the device where there is one, else resident."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Rollout and training seconds and peak memory of one side."""
    import torch
    from diffusers import UNet2DConditionModel

    from benchmarks.full_size_order import gradient_of_ours, gradient_of_published
    from spo.algorithm.denoiser import Conditioning, GuidedDenoiser
    from spo.algorithm.diffusion import scaled_linear_alphas_cumprod, sigma_ladder
    from spo.algorithm.objective import spo_loss
    from spo.algorithm.rollout import RolloutSettings, Scoring, sample_spo
    from spo.headless.host import repeat_conditioning
    from spo.lora.adapter import Adapter, modules_of_kinds
    from spo.rng import SeededDraws

    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    with device:
        unet = (
            UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).to(dtype).requires_grad_(False).eval()
        )
        text = Conditioning(torch.randn(1, 77, 768, dtype=dtype))
        empty = Conditioning(torch.randn(1, 77, 768, dtype=dtype))
    alphas = scaled_linear_alphas_cumprod().to(device)
    sigmas = sigma_ladder("ddim", options.sampling_steps, alphas.cpu()).to(device)
    adapter = Adapter(unet, modules_of_kinds(unet, ["attention"]), rank=4, alpha=4, seed=options.seed)
    copied = copy.deepcopy(unet) if side == "published" else None

    def denoiser_of(network: Any) -> GuidedDenoiser:
        def predict(x: Any, timesteps: Any, conditioning: Conditioning) -> Any:
            return network(x.to(dtype), timesteps, conditioning.cross_attention).sample

        return GuidedDenoiser(predict, alphas, "epsilon")

    policy = denoiser_of(unet)
    arguments = {"cond": text, "uncond": empty, "guidance_scale": 5.0}

    class Scorer:
        name, needs_pixels, needs_denoised = "mean of a channel", False, True

        def score(self, candidates: Any, prompts: Any) -> Any:
            return 100 * candidates.denoised[:, :, 0].mean((2, 3))

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = clock()
    draws = SeededDraws([options.seed])
    size = options.latent_px
    rolled = sample_spo(
        policy, draws.initial((4, size, size)).to(device) * sigmas[0], sigmas, arguments,
        settings=RolloutSettings(threshold=0.0), draws=draws, alphas_cumprod=alphas, scoring=Scoring(Scorer(), [""]),
        repeat=repeat_conditioning,
    )  # fmt: skip
    assert rolled.pairs is not None
    sampled = clock()

    loss = partial(spo_loss, beta=10.0, ratio_clamp=0.1)
    reference = denoiser_of(copied) if copied is not None else policy
    gradient = gradient_of_published if side == "published" else gradient_of_ours
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=6e-5)
    losses = []
    for rows in torch.arange(len(rolled.pairs)).split(options.pairs_per_update):
        pairs = rolled.pairs.rows(rows)
        repeated = {"cond": text.repeat(len(pairs)), "uncond": empty.repeat(len(pairs)), "guidance_scale": 5.0}
        optimizer.zero_grad(set_to_none=True)
        losses.append(gradient(policy, reference, adapter, pairs, repeated, loss))
        optimizer.step()
    trained = clock()
    return {
        "rollout_s": sampled - start,
        "training_s": trained - sampled,
        "peak_bytes": peak_bytes(options.device),
        "pairs": len(rolled.pairs),
        "last_loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-px", type=int, default=8, help="side of the latent (64 is a picture of 512 pixels)")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--pairs-per-update", type=int, default=4)
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
    import peft
    import torch

    print(
        f"one prompt, SD1.5's UNet (random weights), latent {options.latent_px} x {options.latent_px}, "
        f"{options.sampling_steps} steps, K = 4, seed {options.seed}, {options.device}\n"
        f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"peft {peft.__version__}, {torch.get_num_threads()} threads\n"
    )
    print(f"{'':14}{'ours':>10}{'published':>12}{'ratio':>8}")
    for name, unit, scale in (("rollout_s", "s", 1), ("training_s", "s", 1), ("peak_bytes", "GiB", 2**30)):
        ours, published = (results[side][name] / scale for side in SIDES)
        label = f"{name.split('_')[0]} [{unit}]"
        print(f"{label:14}{ours:10.2f}{published:12.2f}{ours / published:8.2f}")
    pairs = [int(results[side]["pairs"]) for side in SIDES]
    print(f"{'pairs':14}{pairs[0]:10}{pairs[1]:12}")
    print(f"{'last loss':14}{results['ours']['last_loss']:10.6f}{results['published']['last_loss']:12.6f}")


if __name__ == "__main__":
    main()
