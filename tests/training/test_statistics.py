"""The numbers of one row of metrics."""

from __future__ import annotations

import torch

from spo.algorithm.objective import PairLoss
from spo.algorithm.rollout import PoolScores
from spo.runs.metrics import TITLES
from spo.training.schedule import Position
from spo.training.statistics import BatchStatistics, pool_statistics


def test_a_row_has_the_means_over_its_updates_pairs():
    statistics = BatchStatistics(gradient_norms=[1.0, 2.0], train_seconds=2.0, rollout_seconds=3.0, pairs=3, images=10)
    for losses in ([1.0, 2.0], [3.0]):
        loss = torch.tensor(losses)
        statistics.add_results([PairLoss(loss, loss + 1, loss - 1, loss > 2)])
    row = statistics.row(Position(batch=7, step=9, images=80, seconds=11.0), batches=3, rate=1e-3)
    expected = {
        "batch": 7, "step": 9, "epoch": 2, "images": 80, "pairs": 3, "loss": 2.0, "ratio_win": 3.0, "ratio_lose": 1.0,
        "ratio_clamped_share": 1 / 3, "gradient_norm": 1.5, "learning_rate": 1e-3, "images_per_s": 2.0,
        "pairs_per_s": 1.5, "seconds": 11.0, "preference_mean": None, "kept_share": None,
    }  # fmt: skip
    assert row == expected and set(row) == set(TITLES)


def test_a_batch_without_updates_has_empty_cells():
    row = BatchStatistics().row(Position(), batches=1, rate=0.0)
    assert row["loss"] is None and row["images_per_s"] is None and row["pairs_per_s"] is None


def test_scores_of_a_rollout_by_timestep():
    pools = [
        PoolScores(1, 701.2, torch.tensor([[1.0, 3.0]]), torch.tensor([True, False])),
        PoolScores(2, 501.0, torch.tensor([[5.0, 7.0]]), torch.tensor([True, True])),
    ]
    assert pool_statistics(pools) == {"mean": 4.0, "kept": 0.75, "preference_t701": 2.0, "preference_t501": 6.0}
    assert pool_statistics([]) == {}
