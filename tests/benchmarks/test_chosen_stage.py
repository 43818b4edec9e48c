"""benchmarks/chosen_stage: the rule from a run's numbers, and in how many seeds it keeps what it should."""

from __future__ import annotations

import torch

from benchmarks.chosen_stage import chosen_step, summary
from spo.training.stages import TOLERATED, Check, Stages


def row(judge, adherence=0.0, low=None, diversity=0.0):
    values = {
        "judge": judge, "adherence_lost": adherence, "adherence_lost_low": adherence if low is None else low,
        "diversity_lost": diversity, "diversity_lost_low": 0.01,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def test_the_judges_best_of_those_that_lost_nothing():
    more = TOLERATED["adherence"] + 0.01
    checks = {0: row(9.0), 10: row(1.0), 20: row(2.0, more), 30: row(1.5, more, low=-0.01), 40: row(3.0, diversity=0.5)}
    assert chosen_step(checks) == 30  # 20 and 40 lost too much, 30 perhaps not
    assert chosen_step({0: row(0.0), 10: row(1.0, more), 20: row(2.0, more)}) == 20  # none is left: the last


def test_it_is_the_products_rule():
    """On checks of which one loses adherence; `Stages` keeps the best as they come."""
    stages = Stages()
    rows = {}
    for step, judge, adherence in ((0, 1.0, 0.9), (10, 1.2, 0.89), (20, 1.5, 0.87), (30, 1.8, 0.7), (40, 1.6, 0.6)):
        noise = [0.001 * n for n in range(8)]
        check = Check(
            step, (0.0,) * 8, tuple(judge + n for n in noise), tuple(adherence + n for n in noise),
            (0.1,) * 8 if step == 0 else (), (1.0,) * 8,
        )  # fmt: skip
        stages.add(check, torch.zeros(1), {})
        lost = (0.9 - adherence) / 0.8
        rows[step] = row(judge, lost, lost)
    assert chosen_step(rows) == stages.best_step == 20


def test_the_summary_counts_seeds_that_keep_the_rule():
    def stages(seed, chosen):
        numbers = ((10, 0.90, 1.0), (20, 0.95, 1.0), (30, 0.97, 0.9))
        return [
            {"seed": str(seed), "step": str(step), "chosen": str(int(step == chosen)), "taste": str(70.0 + step),
             "win_rate": str(wins), "recognised": str(kept)}
            for step, wins, kept in numbers
        ]  # fmt: skip

    text = summary([*stages(0, 20), *stages(1, 10), *stages(2, 30)])
    assert "seed 0: update 20 chosen" in text and "(best 95.0%)" in text
    assert text.endswith("1 of 3 within 3% of the best with 98% kept")  # seed 1 wins less, seed 2 lost subjects
