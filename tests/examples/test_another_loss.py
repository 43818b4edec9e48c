"""Another loss: a function of the pairs' log ratios, handed to `train`. It touches no file of the package.

To be chosen by `--loss NAME` it would take three: the function in algorithm/objective.py, the choice in config.py, one
line in training/gradient.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spo.algorithm.objective import PairLoss
from spo.training.loop import train
from tests.tiny_host import PROMPTS, MeanOfChannel, TinyHost, rows_of, small, weights_of


def squared_margin(log_ratio_win: Tensor, log_ratio_lose: Tensor) -> PairLoss:
    """IPO's (Azar et al. 2023, eq. 17) on transitions: the difference of log ratios is drawn to a fixed margin."""
    loss = (log_ratio_win - log_ratio_lose - 0.5).square()
    ratios = (log_ratio_win.detach().exp(), log_ratio_lose.detach().exp())
    return PairLoss(loss, *ratios, torch.zeros_like(loss, dtype=torch.bool))


def test_another_loss_trains(tmp_path):
    config = small(tmp_path, steps=3)
    report = train(TinyHost(config), config, PROMPTS, MeanOfChannel(), loss=squared_margin)
    assert report.finished
    losses = [float(row["loss"]) for row in rows_of(config) if row["loss"]]
    assert losses[0] == pytest.approx(0.25, abs=1e-6)  # policy and reference are the same to begin with
    assert losses[-1] != losses[0]
    assert all(float(layer.up.abs().max()) > 0 for layer in weights_of(report.output).values())
