"""The pixel CNN: its scores and its file; and the demo's second judge, which is one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from spo.algorithm.preference import Candidates
from spo.errors import SpoError
from spo.preference.cnn_file import save_cnn
from spo.preference.load import BUNDLED_FILES, load
from spo.preference.pixel_cnn import PixelCNN


def pool_of(pictures):
    latents = torch.zeros(*pictures.shape[:2], 4, 8, 8)
    return Candidates(latents, 0.0, 0.0, latents, lambda flat: pictures.flatten(0, 1))


def test_a_file_is_known_by_its_metadata_and_scores_as_the_network_did(tmp_path):
    torch.manual_seed(0)
    network = PixelCNN(width=8)
    save_cnn(network, tmp_path / "taste.safetensors", {})
    model = load(tmp_path / "taste.safetensors", finished=True)
    assert isinstance(model, PixelCNN) and model.name == "taste"
    pictures = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    scores = model.score(pool_of(pictures), ["", "", ""])
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores, network(pictures.flatten(0, 1)).view(2, 3), rtol=1e-2, atol=1e-3)


def test_a_damaged_file_is_named(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "bad.safetensors", {"spo_preference": "pixel_cnn", "width": "8"})
    with pytest.raises(SpoError, match='"bad.safetensors" is a damaged pixel CNN'):
        load(tmp_path / "bad.safetensors", finished=True)


def test_the_demos_judge_is_small_and_prefers_vivid_pictures():
    assert BUNDLED_FILES["demo-judge"].stat().st_size < 300_000
    judge = load("demo-judge", finished=True)
    vivid = torch.ones(1, 3, 64, 64)
    vivid[:, :, 16:48, 16:48] = torch.tensor([0.9, -0.6, -0.8]).view(3, 1, 1)
    strengths = torch.tensor([0.1, 0.4, 0.7, 1.0]).view(4, 1, 1, 1)
    grey = vivid.mean(1, keepdim=True)
    scores = judge.score(pool_of((grey + strengths * (vivid - grey))[:, None]), ["red square"])[:, 0]
    assert (scores.diff() > 0).all()
