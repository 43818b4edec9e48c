"""benchmarks/evidence: what is counted, what the wrappers tell, what the tables say. Over the tiny host."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from unittest import mock

import pytest
import torch

from benchmarks.evidence import ablations, runs
from benchmarks.evidence.experiments import BUDGET, EXPERIMENTS
from benchmarks.evidence.report import compared, over_prompts, read_stops, run_rows, second_taste, second_taste_table
from benchmarks.evidence.runs import Evaluations, Run, count_evaluations, run_one
from benchmarks.evidence.taste_head import votes_of
from spo.algorithm.preference import Candidates
from spo.config import build_config
from spo.demo.judge import held_out
from spo.demo.run import demo_config
from spo.evaluation.interval import bootstrap_interval
from spo.training.loop import train
from tests.tiny_host import PROMPTS, MeanOfChannel, TinyHost, small


def test_every_run_has_its_own_name_and_settings_that_exist(tmp_path):
    planned = [run for make in EXPERIMENTS.values() for seed in (0, 1) for run in make(seed)]
    assert len({run.name for run in planned}) == len(planned)
    for run in planned:
        demo_config(tmp_path, dict(run.changes))
        assert run.wrapper in ablations.NAMES
        assert list(run.stops) == sorted(run.stops)


def test_counts_sampling_reference_policy_and_backward_by_hand(tmp_path):
    """4 steps, divert 1, K = 2, guided: 12 a picture in sampling. A pair has 2 of each in training (guidance)."""
    config = small(tmp_path, steps=2, threshold=0.0)
    host, counts = TinyHost(config), Evaluations()
    hook = count_evaluations(host.network, counts)
    train(host, config, PROMPTS, MeanOfChannel())
    hook.remove()
    pairs = 2 * 2
    assert counts == Evaluations(sampling=2 * 12, reference=2 * pairs, policy=2 * pairs, backward=2 * pairs)
    assert counts.total == 24 + 6 * pairs == host.evaluations + counts.backward


def test_the_rules_verdicts_as_votes():
    clean, taste = torch.randn(2, 4, 4, 8, 8), torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    votes = votes_of(clean, taste)
    assert votes.latents.shape == (12, 2, 4, 8, 8) and votes.groups == (0,) * 6 + (1,) * 6
    assert torch.equal(votes.latents[1], clean[0, [0, 2]]) and torch.equal(votes.latents[-1], clean[1, [2, 3]])
    assert votes.answers.tolist() == [1, 1, 1, 0, 1, 1] + [0] * 6


class CountingJudge:
    """Says how many verdicts were asked for before."""

    def __init__(self, work, rule):
        assert rule == "sharpness"

    def judge(self, host):
        CountingJudge.asked += 1
        return {"taste": [float(CountingJudge.asked)] * 64, "recognised": [1.0] * 64}

    of_base = judge


def test_a_finished_run_is_not_done_again_but_judged_where_that_is_missing(tmp_path, monkeypatch, capsys):
    for name in ("EvidenceJudge", "load_host", "adapter_from_file"):
        monkeypatch.setattr(runs, name, mock.MagicMock())
    monkeypatch.setattr(runs, "EvidenceJudge", CountingJudge)
    CountingJudge.asked = 0
    run = Run("an experiment", "a variant", 3, rule="sharpness")
    rows = [{"updates": n, "evaluations": {"sampling": 7}, "lora": f"{n}.safetensors" if n else ""} for n in range(3)]
    result = tmp_path / f"{run.name}.json"
    result.write_text(json.dumps({"run": asdict(run), "rows": rows, "seconds": 1.0}))
    assert run_one(run, tmp_path) == result
    judged = json.loads(result.read_text())["rows"]
    assert [row["judged"]["taste"][0] for row in judged] == [1, 2, 3]
    assert [call.args[1] for call in runs.adapter_from_file.call_args_list] == [
        tmp_path / "loras" / f"{n}.safetensors" for n in (1, 2)
    ]
    assert "taste 1 -> 2, 3, subjects 100%, 2 updates, 7 evaluations" in capsys.readouterr().out
    run_one(run, tmp_path)
    assert CountingJudge.asked == 3
    runs.judge_again(tmp_path)
    assert [row["judged"]["taste"][0] for row in json.loads(result.read_text())["rows"]] == [4, 5, 6]


class Told:
    """A preference model that notes what it is told."""

    name, needs_pixels, needs_denoised = "told", False, True

    def score(self, candidates, prompts):
        self.candidates = candidates
        return candidates.prediction()[:, :, 0, 0, 0]


def pool():
    x, denoised = torch.randn(2, 3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    return Candidates(x, 3.0, 601.0, denoised, lambda latents: latents)


def test_scorers_that_know_less():
    model, candidates = Told(), pool()
    ablations.wrapped("blind", model, ExitStack()).score(candidates, ["", ""])
    assert model.candidates.timestep == 0
    noisy = ablations.wrapped("noisy", model, ExitStack())
    assert not noisy.needs_denoised
    noisy.score(candidates, ["", ""])
    torch.testing.assert_close(model.candidates.prediction(), candidates.x / 10**0.5)
    assert ablations.wrapped("", model, ExitStack()) is model
    with pytest.raises(ValueError, match="wrapper 'none'"):
        ablations.wrapped("none", model, ExitStack())


@pytest.mark.parametrize("name", ["best parent", "worst parent"])
def test_the_parent_is_the_pools_best_or_worst(name):
    with ExitStack() as stack:
        model = ablations.wrapped(name, Told(), stack)
        draws = ablations.headless_host.SeededDraws([1, 2])
        scores = model.score(pool(), ["", ""])
        expected = scores.argmax(0) if name == "best parent" else scores.argmin(0)
        assert torch.equal(draws.parents(5, 3), expected)
    assert ablations.headless_host.SeededDraws is ablations.SeededDraws


def write_run(work, variant, seed, gain, cost=BUDGET, experiment="ablations"):
    """A run whose pictures gain `gain`, and 1 more where the prompt's number is odd."""
    base = [70.0] * 64
    judged = {"taste": base, "recognised": [1.0] * 64, "diversity": [0.02] * 32}
    after = judged | {"taste": [70 + gain + row % 2 for row in range(64)], "recognised": [1.0] * 63 + [0.0]}
    evaluations = {"sampling": cost - 6, "reference": 2, "policy": 2, "backward": 2}
    facts = {
        "run": {"experiment": experiment, "variant": variant, "seed": seed},
        "config": build_config({"learning_rate": 1e-3}).flat(),
        "rows": [
            {"evaluations": dict.fromkeys(evaluations, 0), "updates": 0, "judged": judged},
            {"evaluations": evaluations, "updates": 22, "judged": after},
        ],
    }
    (work / f"{experiment}--{variant}--{seed}.json").write_text(json.dumps(facts))


def test_variants_are_compared_with_the_papers_run_of_the_same_seed_at_one_cost(tmp_path):
    for seed, gain in ((0, 10.0), (1, 4.0)):
        write_run(tmp_path, "paper", seed, gain)
        write_run(tmp_path, "other", seed, 2 * gain, cost=2 * BUDGET, experiment="options")
    write_run(tmp_path, "other", 2, 50.0, experiment="options")  # a seed that the paper's has not
    stops = read_stops(tmp_path)
    assert len(stops) == len(run_rows(stops)) == 5
    (paper,) = compared(stops, "ablations")
    assert paper["gain"] == pytest.approx(7.5)
    assert paper["gain_of_each_seed"] == "10.5 4.5"
    assert paper["more_than_paper"] is None
    assert paper["recognised"] == pytest.approx(63 / 64)
    (other,) = compared(stops, "options")
    assert other["seeds"] == 3
    # of seeds 0 and 1: (2 gain + odd) / 2 - (gain + odd) = -odd / 2
    assert other["more_than_paper"] == pytest.approx(-0.25)
    assert other["more_low"] < -0.25 < other["more_high"]


def test_intervals_are_over_prompts():
    values = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).tolist()
    found = over_prompts(values)
    of_prompt = torch.tensor(values).view(2, 2, 32).mean((0, 1))  # two pictures each in two runs
    assert len(set(held_out(64)[0])) == 32
    assert found.mean == pytest.approx(float(of_prompt.mean()))
    expected = bootstrap_interval(of_prompt)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_the_second_taste_is_told_by_both_rules(tmp_path):
    """Sharper in every picture but the first by 0.1 or 0.2; colours pale by 5."""
    base = {"sharpness": [0.5] * 64, "colourfulness": [70.0] * 64}
    after = {"sharpness": [0.4, *(0.6 + 0.1 * (row % 2) for row in range(1, 64))], "colourfulness": [65.0] * 64}
    same = {"recognised": [1.0] * 32 + [0.5] * 32, "diversity": [0.02] * 32}
    rows = [
        {"updates": 0, "evaluations": {"sampling": 0}, "judged": base | same},
        {"updates": 9, "evaluations": {"sampling": 7, "policy": 3}, "judged": after | same},
    ]
    (tmp_path / "second_taste--sharpness--2.json").write_text(json.dumps({"run": {"seed": 2}, "rows": rows}))
    (row,) = second_taste(tmp_path)
    assert (row["seed"], row["updates"], row["evaluations"]) == (2, 9, 10)
    assert row["sharpness"] - row["base_sharpness"] == pytest.approx(sum(after["sharpness"]) / 64 - 0.5)
    assert row["sharpness_gain_low"] < 0.147 < row["sharpness_gain_high"]
    assert row["win_rate"] == pytest.approx(63 / 64)
    line = second_taste_table([row]).splitlines()[-1]
    assert "-5.0 (-5.0 to -5.0)" in line and "75.0%" in line and "98% (" in line
