"""Checks of stages: what they measure, that training does not feel them, and that the best stage survives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spo.errors import SpoError
from spo.progress import Watcher
from spo.report.curves import curves
from spo.runs.layout import RunFiles
from spo.runs.metrics import read_metrics
from spo.training.loop import portions_of, train
from spo.training.validation import Judges, measure, prompts_of_checks
from tests.tiny_host import PROMPTS, MeanOfChannel, TinyHost, rows_of, same_weights, small, weights_of


class Channel:
    """A judge of finished pictures: `scale` times the mean of one of their channels."""

    adherence = ""

    def __init__(self, channel=0, scale=20.0):
        self.name, self.channel, self.scale = f"channel {channel}", channel, scale

    def scores(self, pixels, latents, prompts):
        return self.scale * latents[:, self.channel].mean((1, 2))


class Fading(Channel):
    """Likes the base best, and every later picture less; what it was shown is counted."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def scores(self, pixels, latents, prompts):
        self.calls += 1
        return torch.full((len(prompts),), -float(self.calls))


def checked(folder, **changes):
    return small(folder, **{"validate_every": 1, "validate_pictures": 2, "patience": 0, "save_every": 0, **changes})


def judges():
    return Judges(Channel())


def run(config, by=None, **more):
    return train(TinyHost(config), config, PROMPTS, MeanOfChannel(), judges=by or judges(), **more)


def test_prompts_are_those_given_or_spread_over_trainings(tmp_path):
    many = [f"a thing {number}" for number in range(160)]
    assert prompts_of_checks(small(tmp_path), many) == many[::10]
    assert prompts_of_checks(small(tmp_path, validate_count=4), many) == many[::40]
    assert prompts_of_checks(small(tmp_path), PROMPTS) == PROMPTS
    assert prompts_of_checks(small(tmp_path, validate_prompts=["b", "a", "b"]), many) == ["b", "a"]


def test_a_check_measures_the_same_pictures_every_time(tmp_path):
    config = checked(tmp_path)
    host = TinyHost(config)
    host.prepare(PROMPTS)

    def once(base=None, **portions):
        some = dataclasses.replace(portions_of(config), **portions)
        by = Judges(Channel(), Channel(1))
        return measure(host, config, PROMPTS, 0, MeanOfChannel(), by, some, Watcher(), base)

    before = torch.random.get_rng_state()
    check, features = once()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert once()[0] == check
    assert len(check.score) == len(check.judge) == len(check.adherence) == len(check.diversity) == len(PROMPTS)
    assert check.score == pytest.approx(check.judge)  # the same measure by two ways
    assert check.chance == check.adherence  # prompts do not matter to this judge
    again, _ = once(features)
    assert again.drift == (0.0, 0.0, 0.0)
    one_by_one = portions_of(config).prompts
    one_by_one.size = 1
    assert once(prompts=one_by_one)[0].score == pytest.approx(check.score, rel=1e-4)


def test_a_check_goes_on_with_less_when_memory_runs_out(tmp_path):
    config, said = checked(tmp_path), []
    host = TinyHost(config)
    host.prepare(PROMPTS)
    whole = host.rollout

    def small_card(prompts, *others):
        if len(prompts) > 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return whole(prompts, *others)

    host.rollout = small_card
    portions = portions_of(config)
    check, _ = measure(host, config, PROMPTS, 0, MeanOfChannel(), judges(), portions, Watcher(log=said.append), None)
    assert len(check.judge) == 3
    assert "prompts_per_call 1" in said[-1]
    assert portions.prompts.size == 10  # training's own is as it was


def test_training_does_not_feel_the_checks(tmp_path):
    without, with_checks = small(tmp_path / "without"), checked(tmp_path / "with", save_every=2)
    train(TinyHost(without), without, PROMPTS, MeanOfChannel())
    run(with_checks, Judges(Fading()))  # so that the best stage is the first
    files = RunFiles.of(with_checks.run.output)
    assert same_weights(weights_of(files.stage(5)), weights_of(without.run.output))
    timing = {"seconds", "images_per_s", "pairs_per_s"}
    for one, other in zip(rows_of(without), rows_of(with_checks), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}
    assert not RunFiles.of(without.run.output).validation.exists()


def test_the_best_stage_is_the_output_and_the_last_is_kept(tmp_path):
    config, said = checked(tmp_path, keep_last=1), []
    report = run(config, Judges(Fading()), watcher=Watcher(log=said.append))
    files = report.files
    assert report.finished
    assert [path.name for path in files.stages()] == ["taste-step000001.safetensors", "taste-step000005.safetensors"]
    assert same_weights(weights_of(files.output), weights_of(files.stage(1)))
    assert not same_weights(weights_of(files.output), weights_of(files.stage(5)))
    assert "The best stage by the held-out judge is that of update 1" in report.verdict
    assert any(text.startswith("Warning: Pictures get worse: at update 2") for text in said)
    rows = read_metrics(files.validation)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["best"] for row in rows] == [0, 1, 0, 0, 0, 0]
    curves(files.metrics, files.curves)


@pytest.mark.parametrize(
    ("changes", "steps"), [({"patience": 2}, 3), ({"on_decline": "stop"}, 2), ({"patience": 2, "steps": 0}, 3)]
)
def test_a_run_ends_when_stages_get_no_better(tmp_path, changes, steps):
    config = checked(tmp_path, **{"epochs": 50, **changes})
    report = run(config, Judges(Fading()))
    assert (report.finished, report.steps) == (True, steps)
    assert report.output == report.files.output
    again = run(checked(tmp_path, epochs=50, steps=5, patience=0), resume=True)  # more is a matter of wish
    assert (again.finished, again.steps) == (True, 5)


@pytest.mark.parametrize("updates_before_stop", [2, 3])
def test_a_stopped_run_has_the_same_checks_and_the_same_best_stage(tmp_path, updates_before_stop):
    changes = {"validate_every": 2, "judge": "a", "sample_every": 0}
    whole, parts = checked(tmp_path / "whole", **changes), checked(tmp_path / "parts", **changes)
    run(whole)
    seen = []
    watcher = Watcher(
        progress=lambda progress: seen.append(progress.step), should_stop=lambda: seen[-1:] == [updates_before_stop]
    )
    report = run(parts, watcher=watcher)
    assert (report.finished, report.steps) == (False, updates_before_stop)
    assert run(parts, resume=True).finished
    ours, theirs = RunFiles.of(whole.run.output), RunFiles.of(parts.run.output)
    assert same_weights(weights_of(ours.output), weights_of(theirs.output))
    assert ours.validation.read_text() == theirs.validation.read_text()
    assert len(ours.validation.read_text().splitlines()) == 1 + 4  # the base, 2, 4 and the end


def test_a_killed_run_makes_its_checks_again(tmp_path):
    whole, killed = (checked(tmp_path / name, save_every=2) for name in ("whole", "killed"))
    run(whole)

    def breaks(text):
        if "update 3" in text:
            raise KeyboardInterrupt  # nothing is saved

    with pytest.raises(KeyboardInterrupt):
        run(killed, watcher=Watcher(log=breaks))
    assert run(killed, resume=True).finished
    ours, theirs = RunFiles.of(whole.run.output), RunFiles.of(killed.run.output)
    assert same_weights(weights_of(ours.output), weights_of(theirs.output))
    assert ours.validation.read_text() == theirs.validation.read_text()


def test_a_run_that_was_begun_without_checks_goes_on_without(tmp_path):
    config, said = checked(tmp_path), []
    train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(should_stop=lambda: True))
    report = run(config, resume=True, watcher=Watcher(log=said.append))
    assert report.finished
    assert said == ["This run was begun without checks of its stages, so it goes on without."]
    assert not report.files.validation.exists()


def test_resume_wants_the_same_judge_by_its_content(tmp_path):
    for name, content in {"a.safetensors": b"one", "b.safetensors": b"one", "c.safetensors": b"another"}.items():
        (tmp_path / name).write_bytes(content)
    config = checked(tmp_path, judge=str(tmp_path / "a.safetensors"))
    run(config, watcher=Watcher(should_stop=lambda: True))
    with pytest.raises(SpoError, match=r"begun with judge .*a\.safetensors.*c\.safetensors"):
        run(checked(tmp_path, judge=str(tmp_path / "c.safetensors")), resume=True)
    assert run(checked(tmp_path, judge=str(tmp_path / "b.safetensors")), resume=True).finished
