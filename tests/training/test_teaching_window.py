"""Pools only where they teach: the window by hand, in a rollout, and over a stop."""

from __future__ import annotations

import dataclasses

import torch

from spo.algorithm.rollout import PoolScores
from spo.progress import Watcher
from spo.runs.metrics import TIMESTEP_PREFIX
from spo.training.loop import train
from spo.training.teaching_window import SURVEY, TeachingWindow
from tests.tiny_host import PROMPTS, MeanOfChannel, TinyHost, rows_of, same_weights, small, weights_of

TIMESTEPS = [700.0, 500.2, 300.0, 99.8]  # where pools drawn at 900, 700, 500 and 300 are scored


def pools(*kept):
    """A pool of ten prompts at each step, that many of them kept."""
    return [
        PoolScores(step, timestep, torch.zeros(2, 10), torch.arange(10) < count)
        for step, (timestep, count) in enumerate(zip(TIMESTEPS, kept, strict=True))
    ]


def limits(window, config, batch):
    rollout = window.narrowed(config, batch).rollout
    return rollout.timestep_min, rollout.timestep_max


def test_the_window_spans_the_steps_that_keep_their_share(tmp_path):
    config, window = small(tmp_path), TeachingWindow(0.5)
    assert limits(window, config, 0) == limits(window, config, 1) == (0, 1000)
    window.learn(pools(1, 8, 2, 4), 0)
    assert limits(window, config, 0) == limits(window, config, SURVEY) == (0, 1000)  # surveys draw everywhere
    assert limits(window, config, 1) == (0, 701)  # from the pool drawn at 700 to the last, over a weak one
    window.learn(pools(9, 9, 9, 9), 3)  # no survey: nothing is learnt
    assert limits(window, config, 4) == (0, 701)
    window.learn(pools(1, 8, 2, 1), SURVEY)  # 4 halved and 1 make 3 of 15
    assert limits(window, config, SURVEY + 1) == (501, 701)
    narrow = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, timestep_max=600))
    assert limits(window, narrow, 1) == (501, 600)


def test_without_a_share_or_a_kept_pair_nothing_is_narrowed(tmp_path):
    config = small(tmp_path)
    off, nothing = TeachingWindow(0.0), TeachingWindow(0.5)
    for window in (off, nothing):
        window.learn(pools(0, 0, 0, 0), 0)
        assert window.narrowed(config, 1) is config
    assert off.kept == []


def test_a_run_draws_fewer_pools_and_goes_on_exactly(tmp_path):
    def config_in(name, share):
        changes = {"teaching_share": share, "steps": 8, "sampling_steps": 8, "threshold": 0.02, "divert_start_step": 0}
        return small(tmp_path / name, **changes)

    config = config_in("whole", 1.0)  # the best step alone
    whole = train(TinyHost(config), config, PROMPTS, MeanOfChannel()).output
    columns = [name for name in rows_of(config)[0] if name.startswith(TIMESTEP_PREFIX)]
    counts = [sum(bool(row[name]) for name in columns) for row in rows_of(config)]
    assert len(counts) > 1 and counts[0] == 8 and all(count < 8 for count in counts[1:SURVEY])

    config = config_in("stopped", 1.0)
    updates = []
    watcher = Watcher(progress=lambda now: updates.append(now.step), should_stop=lambda: max(updates, default=0) >= 5)
    assert not train(TinyHost(config), config, PROMPTS, MeanOfChannel(), watcher).finished
    report = train(TinyHost(config), config, PROMPTS, MeanOfChannel(), resume=True)
    assert same_weights(weights_of(report.output), weights_of(whole))
