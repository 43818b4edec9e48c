"""The loss on labelled pairs: the published recording, ties, extremes, weights of prompts."""

from __future__ import annotations

import pytest
import torch

from spo.preference.clip.loss import pair_label_loss
from tests.conftest import relative_error


def test_equals_the_published_loss(golden):
    recorded = golden("preference_training_loss")
    images = [recorded[f"image_{i}"].clone().requires_grad_() for i in (0, 1)]
    scores = [recorded["logit_scale"] * (image * recorded["text"]).sum(-1) for image in images]
    loss = pair_label_loss(*scores, recorded["label_0"], recorded["num_examples_per_prompt"])
    assert relative_error(loss, recorded["loss"]) < 1e-5
    loss.backward()
    for i, image in enumerate(images):
        assert relative_error(image.grad, recorded[f"grad_image_{i}"]) < 1e-5


def test_the_loss_of_a_tie_and_at_extremes():
    zero, one = torch.zeros(1), torch.ones(1)
    assert float(pair_label_loss(one, one, one / 2, one)) == pytest.approx(0, abs=1e-7)
    assert float(pair_label_loss(zero, zero, one, one)) == pytest.approx(0.693147, abs=1e-6)
    far = pair_label_loss(torch.tensor([1e4]).requires_grad_(), zero, zero, one)
    assert float(far) == pytest.approx(1e4) and torch.isfinite(far)


def test_a_prompt_with_many_pairs_counts_as_one():
    """Three pairs of one prompt and one of another: each prompt has half of the weight."""
    score, label = torch.tensor([2.0, 2.0, 2.0, -1.0]), torch.ones(4)
    loss = pair_label_loss(score, torch.zeros(4), label, torch.tensor([3, 3, 3, 1]))
    right, wrong = torch.log1p(torch.exp(torch.tensor(-2.0))), torch.log1p(torch.exp(torch.tensor(1.0)))
    assert float(loss) == pytest.approx(float(right + wrong) / 2, rel=1e-6)


def test_the_other_picture_wins_by_the_same_loss():
    scores, label, once = (torch.tensor([1.0, -3.0]), torch.tensor([0.5, 2.0])), torch.tensor([1.0, 0.0]), torch.ones(2)
    one, other = pair_label_loss(*scores, label, once), pair_label_loss(*scores[::-1], 1 - label, once)
    torch.testing.assert_close(one, other)
