"""Random checkpoints of full size: load, one rollout and one update at 64 px, the memory of it, the LoRA's modules.

Runs where SPO_FULL_SIZE_DIR names a folder with sd15.safetensors or sdxl.safetensors, in a process for each, so that
the peak of memory is its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.algorithm.preference import Candidates
from spo.config import build_config
from spo.headless.host import load_host
from spo.lora.read import check_matches, read_lora
from spo.training.loop import train

FOLDER = os.environ.get("SPO_FULL_SIZE_DIR", "")
MODULES = {"sd15": 128, "sdxl": 560}
BESIDE_THE_FILE_BYTES = 2e9  # Python, torch, diffusers, and a portion of the file while it is converted


class Brightness:
    """Looks at pictures, so that the VAE is at work too."""

    name, needs_pixels, needs_denoised = "brightness", True, True

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        return candidates.pixels().mean((2, 3, 4))


def largest_resident_bytes() -> int:
    """Since the last call of this; Linux."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(peak[1]) if peak else 0


def one_update(checkpoint: Path, precision: str, output: Path) -> dict[str, Any]:
    """Seconds and largest resident bytes of loading, encoding, and a run of one update; what the LoRA file holds."""
    architecture = checkpoint.stem
    values = {
        "checkpoint": str(checkpoint), "prompts": "x", "output": str(output), "device": "cpu", "precision": precision,
        "width": 64, "height": 64, "steps": 1, "sampling_steps": 3, "candidates": 2, "inner_steps": 0,
        "prompts_per_batch": 1, "pairs_per_update": 1, "accumulation": 1, "divert_start_step": 1, "threshold": 0.0,
        "negative_prompt": "bad", "rank": 4,
    }  # fmt: skip
    config = build_config(values, architecture)
    numbers: dict[str, Any] = {"start_bytes": largest_resident_bytes()}
    began = time.perf_counter()

    def phase(name: str) -> None:
        nonlocal began
        numbers[f"{name}_s"], numbers[f"{name}_bytes"] = time.perf_counter() - began, largest_resident_bytes()
        began = time.perf_counter()

    host = load_host(config)
    phase("load")
    host.prepare(["a fox"])
    phase("encode")
    report = train(host, config, ["a fox"], Brightness())
    phase("update")
    layers = check_matches(read_lora(output), host.network, host.naming, host.architecture)
    numbers["finished"], numbers["modules"] = report.finished, len(layers)
    numbers["learned"] = sum(float(layer.up.abs().max()) > 0 for layer in layers.values())
    numbers["finite"] = all(bool(torch.isfinite(layer.up).all()) for layer in layers.values())
    return numbers


@pytest.mark.skipif(not FOLDER, reason="SPO_FULL_SIZE_DIR names no folder")
@pytest.mark.parametrize(
    ("architecture", "precision"), [("sd15", "bfloat16"), ("sd15", "float32"), ("sdxl", "bfloat16")]
)
def test_one_rollout_and_one_update_at_full_size(tmp_path: Path, architecture: str, precision: str) -> None:
    checkpoint = Path(FOLDER) / f"{architecture}.safetensors"
    if not checkpoint.exists():
        pytest.skip(f"there is no {checkpoint}")
    command = [sys.executable, "-m", "tests.headless.test_full_size", str(checkpoint), precision]
    made = subprocess.run([*command, str(tmp_path / "lora.safetensors")], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    numbers = json.loads(made.stdout.splitlines()[-1])
    print(f"\n{architecture}, {precision}, file {checkpoint.stat().st_size / 1e9:.2f} GB: {json.dumps(numbers)}")
    assert numbers["finished"] and numbers["finite"]
    assert numbers["modules"] == numbers["learned"] == MODULES[architecture]
    weights_bytes = checkpoint.stat().st_size * (2 if precision == "float32" else 1)  # the file's are float16
    assert max(numbers["load_bytes"], numbers["encode_bytes"]) <= weights_bytes + BESIDE_THE_FILE_BYTES


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(one_update(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
