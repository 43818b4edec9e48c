"""The latent CNN: its scores and its file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from spo.algorithm.preference import Candidates
from spo.errors import SpoError
from spo.preference.cnn_file import save_cnn
from spo.preference.latent_cnn import LatentCNN
from spo.preference.load import load


def test_a_file_is_known_by_its_metadata(tmp_path):
    torch.manual_seed(0)
    network = LatentCNN(width=16)
    save_cnn(network, tmp_path / "taste.safetensors", {})
    model = load(tmp_path / "taste.safetensors")
    assert isinstance(model, LatentCNN) and not model.needs_pixels


def test_scores_know_the_timestep_and_need_no_decoder():
    torch.manual_seed(0)
    network = LatentCNN(width=16)
    denoised = torch.randn(3, 2, 4, 8, 8)
    early, late = (
        network.score(Candidates(denoised, 1.0, t, denoised, lambda x: pytest.fail("decoded")), ["", ""])
        for t in (1.0, 901.0)
    )
    assert early.shape == (3, 2) and not torch.allclose(early, late)
    assert torch.equal(early.flatten(), network(denoised.flatten(0, 1), torch.ones(6)))


def test_a_damaged_file_is_named(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "bad.safetensors", {"spo_preference": "latent_cnn", "width": "8"})
    with pytest.raises(SpoError, match='"bad.safetensors" is a damaged latent CNN'):
        load(tmp_path / "bad.safetensors")
