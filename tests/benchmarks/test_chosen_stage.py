"""benchmarks/chosen_stage: which stage a run took, and in how many seeds it keeps what it should."""

from __future__ import annotations

from benchmarks.chosen_stage import chosen_step, summary


def test_what_the_run_took_for_its_best_stage():
    base, worse, more = {"judge": 1.0, "best": 0}, {"judge": 2.0, "best": 0}, {"judge": 3.0, "best": 0}
    assert chosen_step({0: base, 10: worse | {"best": 1}, 20: more}) == 10
    assert chosen_step({0: base, 10: worse, 20: more}) == 20  # none: the last


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
