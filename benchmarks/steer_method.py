"""Method steer beside SPO: a LoRA that learns what the taste slider does, and one that learns from pairs.

    OMP_NUM_THREADS=1 python -m benchmarks.steer_method --work FOLDER

Both follow the same head, of 100 simulated votes (few_votes.py, whose stage `pools` and the pairs of
simulated_voters.py come first), with the same settings, prompts, noise and number of updates. Judged by the voter's
rule, which training never sees, on held-out prompts and seeds. What is in FOLDER/steer_method.csv is not done again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.few_votes import gain_of, head_of, missing, read_bank
from benchmarks.prompt_votes import read_world
from benchmarks.rows import add_row

WAYS: dict[str, dict[str, object]] = {
    "spo": {},
    "steer 1": {"method": "steer", "steer_strength": 1.0},
    "steer 2": {"method": "steer", "steer_strength": 2.0},
    "steer 3": {"method": "steer", "steer_strength": 3.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work: Path = options.work
    table = work / "steer_method.csv"
    with torch.no_grad():
        world, pools = read_world(work, "votes"), read_bank(work)
        for key, way, taste, seed in missing(table, "way", WAYS, options.draws):
            began = time.process_time()
            output = work / f"{way.replace(' ', '_')}_{taste}_{seed}.safetensors"
            head = head_of("random 100", world, pools, taste, seed)
            add_row(table, key | gain_of(head, work, output, taste, seed, WAYS[way]), began)


if __name__ == "__main__":
    main()
