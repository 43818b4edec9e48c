"""The file of a small network: each kind knows its own, and gets its weights, width and name back."""

from __future__ import annotations

import pytest
import torch

from spo.checkpoint.tensor_file import open_tensor_file
from spo.preference.cnn_file import is_cnn, read_cnn, save_cnn
from spo.preference.latent_cnn import LatentCNN
from spo.preference.pixel_cnn import PixelCNN
from spo.preference.placement import placement


@pytest.mark.parametrize(("kind", "other"), [(LatentCNN, PixelCNN), (PixelCNN, LatentCNN)])
def test_a_network_comes_back_as_it_was_saved(tmp_path, kind, other):
    torch.manual_seed(0)
    network = kind(width=8)
    save_cnn(network, tmp_path / "taste.safetensors", {"architecture": "sd15"})
    file = open_tensor_file(tmp_path / "taste.safetensors")
    assert is_cnn(kind, file) and not is_cnn(other, file)
    assert file.metadata["architecture"] == "sd15"
    read = read_cnn(kind, file, "mine", placement("cpu", "float32"))
    assert (read.name, read.width) == ("mine", 8)
    for name, value in network.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.half().float())
    assert not any(value.requires_grad for value in read.parameters())
