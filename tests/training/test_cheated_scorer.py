"""A scorer that is made to be cheated, on the demo checkpoint: checks say so while most subjects are still there."""

from __future__ import annotations

import pytest

from spo.demo.run import demo_config
from spo.evaluation.measures import saturation
from spo.headless.host import load_host
from spo.progress import Watcher
from spo.prompts import read_prompts
from spo.runs.metrics import read_metrics
from spo.training.judges import load_judges
from spo.training.loop import train


class LikesSaturation:
    """Any colour as long as it is strong, whatever the picture shows."""

    name, needs_pixels, needs_denoised = "saturation", True, True

    def score(self, candidates, prompts):
        pixels = candidates.pixels()
        return 40 * saturation(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])


@pytest.mark.slow
def test_a_scorer_made_to_be_cheated_is_caught_before_half_of_the_subjects_are_lost(tmp_path):
    """Followed at a rate that ruins pictures: unwatched, half of the adherence is lost after 14 updates."""
    changes = {
        "sampling_steps": 8, "divert_start_step": 1, "candidates": 2, "threshold": 0.0, "prompts_per_batch": 4,
        "pairs_per_update": 8, "learning_rate": 7e-3, "steps": 32, "save_every": 0, "sample_every": 0,
        "validate_every": 2, "patience": 0, "on_decline": "stop",
    }  # fmt: skip
    config = demo_config(tmp_path, changes)
    host, said = load_host(config), []
    watcher = Watcher(log=said.append)
    judges = load_judges(config, host, watcher.log)
    report = train(host, config, read_prompts(config.prompt.prompts), LikesSaturation(), watcher, judges=judges)
    assert report.finished and report.steps < 32
    assert said[-2].startswith("Warning: Pictures get worse")
    assert read_metrics(report.files.validation)[-1]["adherence_lost"] < 0.5
