"""What several processes spend waiting and sending: measured with two on a CPU, and reckoned for 4 and 8 cards.

    accelerate launch --multi_gpu --num_processes 2 benchmarks/scaling.py FOLDER [--steps 8]
    python benchmarks/scaling.py --model MEASURED.json

The first trains on the demo checkpoint and then sends what a run at full size would: meetings, gradients and pairs of
SD1.5's and SDXL's sizes. The main process prints it, and writes FOLDER/measured.json. The second prints the table of
docs/several_gpus.md.

What is reckoned: the published runs' times (48 and 118 GPU hours, 1,000 and 5,000 rollouts) divided by the cards, and
on top the bytes below. Pairs go through main memory, at the speed that was measured; gradients between cards, at
`CARDS_BYTES_PER_S`, an assumption for cards without NVLink.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spo.cli.several import processes_of_launch  # noqa: E402
from spo.demo.run import demo_config  # noqa: E402
from spo.headless.host import load_host  # noqa: E402
from spo.preference.load import load_preference  # noqa: E402
from spo.prompts import read_prompts  # noqa: E402
from spo.training.accelerated import AcceleratedProcesses  # noqa: E402
from spo.training.loop import train  # noqa: E402

CARDS_BYTES_PER_S = 10e9
MEETINGS_A_ROLLOUT, MEETINGS_AN_UPDATE = 4, 2


@dataclass(frozen=True)
class Size:
    """Of a published run. seconds: of one rollout and its updates on one card; pairs: of a rollout, all kept."""

    name: str
    parameters: float
    pair_bytes: int
    pairs: int
    pairs_an_update: int
    seconds: float


SIZES = (
    Size("SD1.5", 0.80e6, 4 * 4 * 64 * 64 * 4, 40 * 16, 40, 48 * 3600 / 1000),
    Size("SDXL", 92.9e6, 4 * 4 * 128 * 128 * 4, 8 * 16, 16, 118 * 3600 / 5000),
)


def measure(folder: Path, steps: int) -> None:
    """Train on the demo checkpoint, then send; see above."""
    torch.set_num_threads(1)
    with processes_of_launch("cpu") as processes:
        assert isinstance(processes, AcceleratedProcesses), "start it with accelerate launch --multi_gpu"
        config = demo_config(folder, {"steps": steps, "validate_every": 0, "save_every": 0, "replace": True})
        host = load_host(config)
        preference = load_preference(config, host.device, host.architecture)
        began, waited, moved = time.monotonic(), processes.waiting_s, processes.moving_s
        bytes_before = processes.moved_bytes
        report = train(host, config, read_prompts(config.prompt.prompts), preference, processes=processes)
        seconds = time.monotonic() - began
        mine = {
            "seconds": seconds,
            "waiting": (processes.waiting_s - waited) / seconds,
            "moving": (processes.moving_s - moved) / seconds,
            "megabytes": (processes.moved_bytes - bytes_before) / 1e6,
            "updates": report.steps,
        }
        shares = processes.gather(lambda: mine)
        measured = {"processes": shares, **_sent(processes)}
        if processes.index == 0:
            (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
            print(json.dumps(measured, indent=1))


def _sent(processes: AcceleratedProcesses) -> dict[str, float]:
    """Seconds of a meeting, and bytes a second of objects and of gradients."""
    began = time.monotonic()
    for _ in range(200):
        processes.gather(lambda: None)
    meeting_s = (time.monotonic() - began) / 200
    pairs = torch.zeros(8_000_000)
    began = time.monotonic()
    processes.gather(lambda: pairs)
    pairs_s = time.monotonic() - began
    weight = torch.nn.Parameter(torch.zeros(8_000_000))
    weight.grad = torch.ones(8_000_000)
    began = time.monotonic()
    processes.sum_gradients([weight])
    gradient_s = time.monotonic() - began
    return {
        "meeting_s": meeting_s,
        "pairs_bytes_per_s": pairs.nbytes * processes.count / pairs_s,
        "gradient_bytes_per_s": pairs.nbytes / gradient_s,
    }


def model(measured: dict[str, float]) -> str:
    """The table for 1, 4 and 8 cards."""
    lines = [
        "| | cards | gradient, MB an update | pairs, MB a rollout | updates a rollout | seconds a rollout | of them "
        "sending and meeting | faster than one card |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        updates = size.pairs // size.pairs_an_update
        gradient, pairs = 4 * size.parameters, size.pairs * size.pair_bytes
        for cards in (1, 4, 8):
            sent = 0.0
            if cards > 1:
                ring = 2 * (cards - 1) / cards * gradient / CARDS_BYTES_PER_S
                meetings = (MEETINGS_A_ROLLOUT + MEETINGS_AN_UPDATE * updates) * measured["meeting_s"] * cards / 2
                sent = updates * ring + pairs / measured["pairs_bytes_per_s"] + meetings
            seconds = size.seconds / cards + sent
            lines.append(
                f"| {size.name} | {cards} | {gradient / 1e6:.1f} | {pairs / 1e6:.0f} | {updates} | {seconds:.1f} | "
                f"{sent / seconds:.1%} | {size.seconds / seconds:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("scaling"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--model", type=Path, metavar="MEASURED.json")
    options = parser.parse_args()
    if options.model:
        print(model(json.loads(options.model.read_text())))
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        measure(options.folder, options.steps)


if __name__ == "__main__":
    main()
