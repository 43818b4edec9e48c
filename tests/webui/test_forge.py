"""What is refused in Forge, with stand-ins for its model: before anything is touched, in one sentence."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from spo.errors import SpoError
from spo.webui import forge


def model(*, inputs=4, prediction_type="epsilon", storage=torch.float16, **changes):
    """A model as Forge has it in memory, as far as it is looked at."""
    blocks = [torch.nn.ModuleList([torch.nn.Conv2d(inputs, 8, 3)])]
    unet = SimpleNamespace(
        diffusion_model=SimpleNamespace(input_blocks=blocks), storage_dtype=storage,
        predictor=SimpleNamespace(prediction_type=prediction_type),
    )  # fmt: skip
    info = SimpleNamespace(title="a.safetensors", name_for_extra="a", shorthash="0123456789", filename="/a.safetensors")
    usual = {"is_sd1": True, "is_sd2": False, "is_sdxl": False, "sd_checkpoint_info": info}
    return SimpleNamespace(forge_objects=SimpleNamespace(unet=SimpleNamespace(model=unet)), **{**usual, **changes})


@pytest.fixture
def loaded(monkeypatch):
    """Puts a model into the WebUI's memory."""

    def load(one):
        data = SimpleNamespace(sd_model=one, forge_loading_parameters={})
        monkeypatch.setitem(sys.modules, "modules", SimpleNamespace(sd_models=SimpleNamespace(model_data=data)))

    return load


def test_a_checkpoint_that_fits(loaded):
    loaded(model())
    checkpoint = forge.loaded_checkpoint()
    forge.refuse_training(checkpoint)
    assert (checkpoint.architecture, checkpoint.prediction_type, checkpoint.name) == ("sd15", "epsilon", "a")


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (None, "No checkpoint is loaded"),
        (model(is_sd1=False), "not SD1.5 or SDXL"),  # Flux, SD3, Chroma, Wan
        (model(is_sd2=True), "Stable Diffusion 2"),
        (model(inputs=9), "takes 9 channels"),
        (model(is_sd1=False, is_sdxl=True), "SDXL refiner"),
        (model(prediction_type="edm"), 'predicts "edm"'),
    ],
)
def test_a_checkpoint_that_does_not(loaded, one, words):
    loaded(one)
    with pytest.raises(SpoError, match=words):
        forge.loaded_checkpoint()


def test_weights_of_fewer_bits_cannot_be_trained(loaded):
    loaded(model(storage="nf4"))
    with pytest.raises(SpoError, match="kept as nf4, which cannot be trained"):
        forge.refuse_training(forge.loaded_checkpoint())
