"""The rules by hand: which stage is the best, what counts as a decline, when a run ends."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spo.config import build_config
from spo.training.stages import Check, Stages, decline, gain, loss, lost, worse

PROMPTS = 8
WEIGHTS, FEATURES = {"one.down": torch.ones(2)}, torch.zeros(1)


def settings(**changes):
    return build_config(changes).validation


def varied(value, by=0.01):
    """One number for each prompt, about `value`."""
    return tuple(value + by * (number - (PROMPTS - 1) / 2) for number in range(PROMPTS))


def check(step, judge=0.0, score=0.0, adherence=0.9, diversity=1.0, **more):
    return Check(step, varied(score), varied(judge), varied(adherence), diversity=varied(diversity), **more)


def base():
    return dataclasses.replace(check(0), chance=varied(0.1))


def stages_of(*checks):
    stages = Stages()
    for one in (base(), *checks):
        stages.add(one, FEATURES, {"one.down": torch.full((2,), float(one.step))})
    return stages


def test_a_loss_of_adherence_is_a_share_of_what_prompts_matter():
    """0.9 against 0.1 for other prompts: 0.08 less is a tenth."""
    share = loss(check(10, adherence=0.82), base(), "adherence")
    assert share.mean == pytest.approx(0.1)
    assert loss(check(10, diversity=0.5), base(), "diversity").mean == pytest.approx(0.5)
    blind = dataclasses.replace(base(), chance=varied(0.9))  # the same score for every prompt
    assert loss(check(10, adherence=0.1), blind, "adherence") is None
    assert loss(Check(10, varied(0)), base(), "adherence") is None


def test_lost_is_what_chance_does_not_explain():
    assert set(lost(check(10, adherence=0.5, diversity=0.5), base())) == {"adherence", "diversity"}
    one_prompt = dataclasses.replace(check(10), adherence=(0.4, *base().adherence[1:]))
    assert loss(one_prompt, base(), "adherence").mean > 0.05
    assert lost(one_prompt, base()) == {}  # the interval over prompts holds 0
    assert lost(check(10, adherence=0.885), base()) == {}  # certain, and too little to matter


def test_the_judge_chooses_and_not_the_score_of_training():
    stages = stages_of(check(10, judge=1, score=1), check(20, judge=3, score=2), check(30, judge=2, score=9))
    assert stages.best_step == 20
    assert stages.weights["one.down"].tolist() == [20, 20]
    assert "update 20: +3 against the base" in stages.verdict(30, finished=True)
    assert "It is the LoRA; the last one, of update 30" in stages.verdict(30, finished=True)


def test_a_stage_that_lost_its_subjects_is_not_the_best_whatever_the_judge_says():
    stages = stages_of(check(10, judge=1), check(20, judge=5, adherence=0.5), check(30, judge=9, diversity=0.3))
    assert stages.best_step == 10
    assert stages_of(check(10, adherence=0.3)).best_step == 0
    assert "No stage kept its adherence" in stages_of(check(10, adherence=0.3)).verdict(10, finished=True)


def test_without_a_judge_there_is_no_best_stage():
    unjudged = [dataclasses.replace(one, judge=()) for one in (base(), check(10))]
    stages = Stages()
    for one in unjudged:
        assert not stages.add(one, FEATURES, WEIGHTS)
    assert (stages.best_step, stages.verdict(10, finished=True)) == (0, "")
    assert stages.over(settings(patience=1)) == ""


def test_a_decline_is_said_in_the_second_check_that_finds_it():
    cheated = [check(10, judge=3, score=1), check(20, judge=2, score=5), check(30, judge=1, score=9)]
    assert decline([base(), *cheated[:2]]) == ""
    text = decline([base(), *cheated])
    assert "the held-out judge's score fell by 2 from that at update 10" in text
    assert "while the score that training follows rose by 9" in text
    once = [base(), check(10, judge=3), check(20, judge=2), check(30, judge=3)]
    assert decline(once) == ""  # it came back
    different = [base(), check(10, judge=3), check(20, judge=2), check(30, judge=3, adherence=0.4)]
    assert decline(different) == ""  # not the same thing twice
    lost_twice = [base(), check(10, adherence=0.5), check(20, adherence=0.4)]
    assert "of the adherence to the prompts is lost" in decline(lost_twice)


def test_differences_that_prompts_do_not_agree_on_are_no_decline():
    noisy = Check(20, varied(0), tuple((-1) ** number * 0.5 - 0.01 for number in range(PROMPTS)))
    assert gain(noisy, base(), "judge").mean < 0
    assert worse([base(), check(10), noisy]) == {}


def test_a_climbing_share_of_clamped_ratios_is_a_decline():
    climbing = [dataclasses.replace(check(10 * n), clamped=share) for n, share in enumerate((0.01, 0.35, 0.5), 1)]
    text = decline([base(), *climbing])
    assert text.startswith("Training leaves its reference") and "clamped ratio climbed to 50%" in text
    steady = [dataclasses.replace(check(10 * n), clamped=0.4) for n in (1, 2, 3)]
    assert decline([base(), *steady]) == ""
    stages = stages_of()
    stages.trained([True, False, False, False])
    stages.add(check(10), FEATURES, WEIGHTS)
    assert (stages.checks[-1].clamped, stages.pairs) == (0.25, 0)


def test_patience_counts_checks_without_a_better_stage():
    better = [check(10, judge=1), check(20, judge=2)]
    worse_ones = [check(30, judge=1.9), check(40, judge=1.8)]
    assert stages_of(*better).over(settings(patience=2)) == ""
    assert "the last 2 checks gave no better stage" in stages_of(*better, *worse_ones).over(settings(patience=2))
    assert stages_of(*better, *worse_ones).over(settings(patience=3, on_decline="warn")) == ""
    assert (
        stages_of(*better, *worse_ones).over(settings(patience=0, on_decline="stop")).endswith("before it gets worse.")
    )


def test_what_the_log_says():
    stages = stages_of(check(10, judge=3), check(20, judge=2), check(30, judge=1))
    texts = stages.news(settings(patience=0))
    assert "held-out judge +1 (" in texts[0]
    assert texts[1].startswith("Warning: Pictures get worse: at update 30")
    assert len(stages.news(settings(patience=0, on_decline="ignore"))) == 1
    stages.add(check(40, judge=0.5), FEATURES, WEIGHTS)
    assert len(stages.news(settings(patience=0))) == 1  # said once
    assert "the best stage so far" in stages_of(check(10, judge=3)).news(settings())[0]


def test_checks_are_due_at_the_base_every_so_often_and_at_the_end():
    stages = Stages()
    assert stages.due(0, 10, False)
    stages = stages_of()
    assert [step for step in range(31) if stages.due(step, 10, step == 27)] == [10, 20, 27, 30]
    stages.add(check(20), FEATURES, WEIGHTS)
    assert not stages.due(20, 10, True)


def test_the_state_is_whole(tmp_path):
    stages = stages_of(check(10, judge=1), dataclasses.replace(check(20), clamped=0.5))
    stages.trained([True, False])
    torch.save(stages.state_dict(), tmp_path / "state")
    again = Stages()
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert again.rows() == stages.rows()
    assert repr(again) == repr(stages)
