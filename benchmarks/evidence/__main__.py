"""The experiments of docs/evidence.md on the demo checkpoint, one command each; a stop loses one run at most.

python -m benchmarks.evidence EXPERIMENT --work FOLDER [--seeds 0 1 2]
python -m benchmarks.evidence judge_again --work FOLDER     # after the decoder, the classifier or a rule has changed
python -m benchmarks.evidence report --work FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.evidence import balance, taste_head
from benchmarks.evidence.experiments import EXPERIMENTS
from benchmarks.evidence.report import report
from benchmarks.evidence.runs import judge_again, run_all

OTHERS = {"balance": balance.measure, "taste_head": taste_head.make, "judge_again": judge_again, "report": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[*EXPERIMENTS, *OTHERS])
    parser.add_argument("--work", type=Path, required=True, help="finished runs lie here, and are not done again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="of these variants only, _ for a space")
    options = parser.parse_args()
    if options.experiment in OTHERS:
        OTHERS[options.experiment](options.work)
        return
    runs = [run for seed in options.seeds for run in EXPERIMENTS[options.experiment](seed)]
    chosen = [run for run in runs if not options.only or run.variant.replace(" ", "_") in options.only]
    run_all(chosen, options.work, options.seeds)


if __name__ == "__main__":
    main()
