"""What a rollout through the WebUI costs beyond the WebUI's own Euler a at the same number of network evaluations.

    SPO_WEBUI_DIR=<webui> python benchmarks/rollout_overhead.py [--repetitions 5] [--checkpoint tiny-sd1]

The WebUI's own python runs this, in process and on the CPU. A rollout of B images with K candidates denoises B latents
at the first `divert_start_step` + 1 evaluations of its network and K * B at the others: with 20 steps, K = 4 and start
step 4, B * (5 + 4 * 15) = 65 B latents. The paper's ladder ends at timestep 0, and the last pool is scored without an
evaluation, so both sides evaluate 20 times. Two comparisons are made at that number of evaluations:

same calls  the plain sampler of the same batches: 5 evaluations of B latents and 15 of K * B, as two Euler a runs of 5
            steps with batch B and 15 steps with batch K * B
            (which encodes the prompts twice, a little in the rollout's favour)
one batch   Euler a, 20 steps, with the whole batch nearest to 13/4 B, its time scaled to 65 B

The sides take turns; ratios are those of their medians, of wall time and of the process's CPU time, which other work on
the machine disturbs less. Both end at the final latents: nothing is decoded. The
preference model is the mean of a channel of the latents; its time is measured apart and stays in the rollout's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS, CANDIDATES, START = 20, 4, 4


def start_webui() -> None:
    """The WebUI's modules as its own start loads them, without its server."""
    folder = os.environ["SPO_WEBUI_DIR"]
    os.chdir(folder)
    sys.path.insert(0, folder)
    flags = "--skip-torch-cuda-test --use-cpu all --no-half --precision full --no-hashing --disable-nan-check --nowebui"
    sys.argv = ["launch.py", "--skip-prepare-environment", "--do-not-download-clip", *flags.split()]
    from modules import initialize

    initialize.imports()
    initialize.check_versions()
    initialize.initialize()
    from modules import script_callbacks, shared

    script_callbacks.before_ui_callback()
    shared.opts.data["live_previews_enable"] = False


def load(name: str) -> None:
    """Make that checkpoint the loaded one."""
    from modules import sd_models, shared

    info = next(info for info in sd_models.checkpoints_list.values() if info.name == f"{name}.safetensors")
    shared.opts.data["sd_model_checkpoint"] = info.title
    sd_models.reload_model_weights(info=info) if sd_models.model_data.sd_model else None
    assert sd_models.model_data.get_sd_model() is not None


class MeanOfChannel:
    """Scores latents by the mean of channel 0, and keeps its own time."""

    name, needs_pixels, needs_denoised = "mean-of-channel", False, True

    def __init__(self) -> None:
        self.seconds = 0.0

    def score(self, candidates: Any, prompts: Any) -> Any:
        """See `PreferenceModel`."""
        began = time.perf_counter()
        scores = 20 * candidates.denoised[:, :, 0].mean((2, 3))
        self.seconds += time.perf_counter() - began
        return scores


def euler(batch: int, steps: int, px: int) -> None:
    """The WebUI's own Euler a up to the latents, on the prompt of the rollout."""
    import torch
    from modules import processing, shared

    class UpToLatents(processing.StableDiffusionProcessingTxt2Img):
        def sample(self, *args: Any, **kwargs: Any) -> Any:
            super().sample(*args, **kwargs)
            done = processing.DecodedSamples()
            done.extend([torch.zeros(3, 8, 8)] * len(self.prompts))
            return done

    p = UpToLatents(
        sd_model=shared.sd_model, prompt=["a fox"] * batch, negative_prompt=["bad"] * batch, seed=list(range(batch)),
        subseed=[0] * batch, batch_size=batch, steps=steps, cfg_scale=5.0, width=px, height=px, sampler_name="Euler a",
        scheduler="Automatic", do_not_save_samples=True, do_not_save_grid=True,
    )  # fmt: skip
    try:
        processing.process_images(p)
    finally:
        p.close()


class Counter:
    """Latents that the network denoised, positive and negative prompts counted each."""

    def __init__(self, network: Any) -> None:
        self.latents = self.calls = 0
        network.register_forward_hook(self.count)

    def count(self, module: Any, arguments: Any, output: Any) -> None:
        """A forward hook."""
        self.latents += len(output)
        self.calls += 1


@dataclass(frozen=True)
class Spent:
    """wall_s, cpu_s: seconds; latents: denoised by the network."""

    wall_s: float
    cpu_s: float
    latents: int


def spent_on(work: Callable[[], None], counter: Counter) -> Spent:
    """What `work` costs."""
    latents, wall, cpu = counter.latents, time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu, counter.latents - latents)


def measure(counter: Counter, config: Any, batch: int, px: int, repetitions: int) -> str:
    """One row: medians in seconds, ratios, the preference model's share."""
    from spo.algorithm.rollout import RolloutSettings
    from spo.webui.host import borrowed

    settings = RolloutSettings(candidates=CANDIDATES, divert_start_step=START, threshold=0.0)
    prompts, near = ["a fox"] * batch, max(1, round(batch * 13 / 4))
    scorer = MeanOfChannel()
    spent: dict[str, list[Spent]] = {"rollout": [], "same calls": [], "one batch": []}
    scoring_s: list[float] = []
    with borrowed(config) as host:
        host.prepare(prompts)

        def rollout() -> None:
            host.rollout(prompts, list(range(batch)), settings, scorer, None)

        def same_calls() -> None:
            euler(batch, START + 1, px)
            euler(CANDIDATES * batch, STEPS - START - 1, px)

        sides = {"rollout": rollout, "same calls": same_calls, "one batch": lambda: euler(near, STEPS, px)}
        for number in range(-1, repetitions):  # the first round only warms up
            names = list(sides) if number % 2 else list(reversed(sides))
            for name in names:
                scorer.seconds = 0.0
                cost = spent_on(sides[name], counter)
                if number >= 0:
                    spent[name].append(cost)
                    if name == "rollout":
                        scoring_s.append(scorer.seconds)
    latents = {name: costs[0].latents for name, costs in spent.items()}
    assert latents["rollout"] == latents["same calls"], latents
    scale = latents["rollout"] / latents["one batch"]
    cells = [f"{px} px, B = {batch}", str(latents["rollout"])]
    for kind in ("wall_s", "cpu_s"):
        middle = {name: statistics.median(getattr(cost, kind) for cost in costs) for name, costs in spent.items()}
        cells += [f"{middle['rollout']:.2f}", f"{middle['rollout'] / middle['same calls']:.3f}"]
        cells += [f"{middle['rollout'] / (scale * middle['one batch']):.3f}"]
    return f"| {' | '.join(cells)} | {1000 * statistics.median(scoring_s):.1f} |"


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--checkpoint", default="tiny-sd1")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    start_webui()
    load(options.checkpoint)
    from modules import shared

    from spo.config import build_config

    counter = Counter(shared.sd_model.model.diffusion_model)
    kinds = [f"{kind} s | to same calls | to one batch" for kind in ("wall", "CPU")]
    lines = [f"| rollout of | latents | {' | '.join(kinds)} | preference ms |", f"|{'---|' * 9}"]
    for px in options.sizes:
        values = {
            "prompts": "none", "output": "none.safetensors", "width": px,
            "height": px, "sampling_steps": STEPS, "guidance_scale": 5.0, "negative_prompt": "bad",
        }  # fmt: skip
        config = build_config(values, "sd15")
        for batch in options.batches:
            lines.append(measure(counter, config, batch, px, options.repetitions))
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
