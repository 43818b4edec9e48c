"""What a step's pairs weigh, and which of them the clamp cuts: for each timestep, by LoRAs that were trained.

For a LoRA one batch of pools is sampled by it, with every verdict kept; then the log ratios of its pairs, weighed as in
its training, and which of the pairs its training would keep.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from spo.algorithm.diffusion import timestep_of_sigma
from spo.algorithm.objective import STEP_WEIGHTS, PairDenoiser, pair_loss, step_factor, transition_noise
from spo.config import build_config
from spo.files import write_text
from spo.headless.compare import adapter_from_file
from spo.headless.host import load_host
from spo.preference.load import load_preference
from spo.prompts import read_prompts
from spo.training.gradient import configured_loss, configured_refinements
from spo.training.host import rollout_settings
from spo.training.schedule import batch_of

LORAS = {  # line -> the run whose last LoRA it is
    "paper, rate 1e-3": "ablations--paper--0",
    "paper, rate 3e-3": "learning_rate--0.003--0",
    "gradspo, rate 1e-3": "options--step_weight_gradspo--0",
}
BATCH = 1001  # a rollout that no run reaches


def measure(work: Path) -> None:
    """FOLDER/balance.json: rows of lora, timestep, pairs, kept, clamped, size, and the weights of all kinds."""
    torch.set_num_threads(1)
    rows = [
        row for label, name in LORAS.items() if (work / f"{name}.json").exists() for row in _rows(work, label, name)
    ]
    write_text(work / "balance.json", json.dumps(rows, indent=1) + "\n")


def _rows(work: Path, label: str, name: str) -> list[dict[str, Any]]:
    facts = json.loads((work / f"{name}.json").read_text())
    config = build_config(facts["config"], "sd15")
    host = load_host(config)
    preference = load_preference(config, host.device, host.architecture)
    prompts, seeds = batch_of(BATCH, read_prompts(config.prompt.prompts), config)
    host.prepare(prompts)
    adapter = adapter_from_file(host, work / "loras" / facts["rows"][-1]["lora"])
    every_verdict = dataclasses.replace(rollout_settings(config), threshold=0.0)
    pairs = host.rollout(prompts, seeds, every_verdict, preference, None).pairs
    assert pairs is not None

    def denoise(x: torch.Tensor, sigma: torch.Tensor, image: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return host.denoise(x, sigma, [prompts[i] for i in image.tolist()], step)

    def without(x: torch.Tensor, sigma: torch.Tensor, image: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        with adapter.off():
            return denoise(x, sigma, image, step)

    policy: PairDenoiser = denoise
    with torch.no_grad():
        result = pair_loss(policy, without, pairs, configured_loss(config), 1.0, configured_refinements(config))
    adapter.remove()
    noise = transition_noise(pairs.sigma, pairs.sigma_next, 1.0)
    own = (pairs.sigma.double() - noise.down) / noise.up
    weights = {kind: own * step_factor(kind, pairs.sigma, noise) for kind in STEP_WEIGHTS}
    timesteps = timestep_of_sigma(pairs.sigma, host.alphas_cumprod).round().int()
    rows = []
    for timestep in sorted({*timesteps.tolist()}, reverse=True):
        mine = timesteps == timestep
        rows.append({
            "lora": label, "timestep": timestep, "pairs": int(mine.sum()),
            "kept": float((pairs.gap[mine] > config.rollout.threshold).float().mean()),
            "clamped": float(result.clamped[mine].float().mean()),
            "log_ratio_size": float(result.ratio_win[mine].log().abs().mean()),
            **{f"weight_{kind}": float(values[mine].mean()) for kind, values in weights.items()},
        })  # fmt: skip
    return rows
