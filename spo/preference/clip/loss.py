"""The training loss of a preference model on labelled pairs. Paper, section 3.1; PickScore's (Kirstain et al. 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pair_label_loss(score_0: Tensor, score_1: Tensor, label_0: Tensor, pairs_of_prompt: Tensor) -> Tensor:
    """Divergence of the labels from softmax([score_0, score_1]), averaged with the weights 1 / pairs_of_prompt; scalar.

    score_0, score_1  [N] of the two pictures, log-odds
    label_0           [N] 1: picture 0 won, 0: picture 1 won, 0.5: a tie, whose loss is 0 at equal scores (the cross
                      entropy less ln 2, as published)
    pairs_of_prompt   [N] how many pairs the prompt has in the data
    """
    difference = (score_0 - score_1).float()
    log_p0, log_p1 = (torch.nn.functional.logsigmoid(value) for value in (difference, -difference))
    loss = -label_0 * log_p0 - (1 - label_0) * log_p1 - math.log(2) * (label_0 == 0.5)
    weight = 1 / pairs_of_prompt
    return (loss * weight).sum() / weight.sum()
