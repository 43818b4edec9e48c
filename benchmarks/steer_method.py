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

from benchmarks.few_votes import LORA, head_of, read_bank
from benchmarks.online_votes import judged
from benchmarks.prompt_votes import read_world
from benchmarks.rows import add_row, is_done
from benchmarks.simulated_voters import TASTES
from spo.demo.run import demo_config
from spo.headless.host import load_host
from spo.progress import Watcher
from spo.prompts import read_prompts
from spo.training.loop import train

WAYS = {
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
        for seed in range(options.draws):
            for taste in TASTES:
                for way, changes in WAYS.items():
                    key = {"way": way, "taste": taste, "draw": str(seed)}
                    if is_done(table, key):
                        continue
                    output = work / f"{way.replace(' ', '_')}_{taste}_{seed}.safetensors"
                    values = {"output": str(output), "preference": "", "seed": seed, "replace": True, **LORA, **changes}
                    values |= {"sample_every": 0, "save_every": 0, "validate_every": 0}
                    config = demo_config(work, values)
                    host, head = load_host(config), head_of("random 100", world, pools, taste, seed)
                    began = time.process_time()
                    with torch.enable_grad():
                        train(host, config, read_prompts(config.prompt.prompts), head, Watcher())
                    seconds = time.process_time() - began
                    add_row(table, key | judged(work, host, output, taste) | {"training_seconds": seconds}, began)


if __name__ == "__main__":
    main()
