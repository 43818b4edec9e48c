"""Another preference model: a module with a class and a reader, and one row in `preference.load.KINDS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spo.algorithm.preference import Candidates
from spo.checkpoint.tensor_file import TensorFile, read_tensors
from spo.preference import load as catalogue
from spo.preference.placement import Placement
from spo.training.loop import train
from tests.tiny_host import PROMPTS, TinyHost, rows_of, small

# ---- what would be spo/preference/direction.py


@dataclass
class Direction:
    """A `PreferenceModel`: how far the predicted latent lies in a direction that the file holds."""

    direction: Tensor
    name: str
    needs_pixels: bool = False
    needs_denoised: bool = True

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        return 40 * torch.einsum("kbchw,c->kb", candidates.prediction(), self.direction) / 64


def is_direction(file: TensorFile) -> bool:
    return set(file.tensors) == {"direction"}


def read_direction(file: TensorFile, name: str, place: Placement, /) -> Direction:
    return Direction(read_tensors(file, file.tensors)["direction"].to(place.device), name)


ROW = catalogue.Kind("direction", is_direction, read_direction, Direction, True)

# ----


def test_another_preference_model_is_loaded_and_trains(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(catalogue, "KINDS", (*catalogue.KINDS, ROW))
    file = tmp_path / "colour.safetensors"
    save_file({"direction": torch.tensor([1.0, 0.0, 0.0, -1.0])}, file)
    model = catalogue.load(str(file))
    assert isinstance(model, Direction) and model.name == "colour"
    config = small(tmp_path, steps=3, preference=str(file))
    assert train(TinyHost(config), config, PROMPTS, model).finished
    assert float(rows_of(config)[0]["kept_share"]) > 0
