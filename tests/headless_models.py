"""What the tests of the headless networks load, and what they feed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.algorithm.denoiser import Conditioning
from spo.headless.load import load_model
from spo.headless.model import DiffusersModel
from tests.tiny_checkpoints import (
    TinySource,
    tiny_sd15,
)

PROMPTS = ["a photo of a red apple", "", "castle on a hill, (oil painting:1.2), sunset"]
SIZE = {"width": 64, "height": 96}
LONG = ", ".join(["a very detailed picture of an old castle on a green hill"] * 12)


def load(path: Path, **options: Any) -> DiffusersModel:
    return load_model(path, **({"device": "cpu", "dtype": torch.float32} | options))


def inputs(model: DiffusersModel, count: int = 3) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, 12, 8, generator=generator)
    return x, torch.tensor([999, 501, 0])[:count], model.text_encoders.encode(PROMPTS[:count], **SIZE)


def assert_same_weights(model: DiffusersModel, source: TinySource) -> None:
    model.vae.use("encoder")
    for mine, theirs in zip(
        (model.unet, model.vae.network, *model.text_encoders.networks),
        (source.unet, source.vae, *source.text_encoders),
        strict=True,
    ):
        got, expected = mine.state_dict(), theirs.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def other_vae() -> TinySource:
    return tiny_sd15(7, vae_channels=(32, 64, 64, 64), vae_blocks=2)
