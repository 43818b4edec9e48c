"""One layer of a LoRA: its norm and its alpha."""

from __future__ import annotations

import pytest
import torch

from spo.lora.layer import with_one_alpha
from tests.loras import layer


def test_one_alpha_changes_no_layer_s_effect() -> None:
    layers = {"a": layer(0, alpha=2.0), "b": layer(1, (8, 4, 3, 3), rank=3, alpha=0.5), "c": layer(2, alpha=2.0)}
    found = with_one_alpha(layers)
    assert [lora.alpha for lora in found.values()] == [2.0, 2.0, 2.0]
    assert found["a"] is layers["a"]
    for name, lora in layers.items():
        assert found[name].norm() == pytest.approx(lora.norm(), rel=1e-6)
        assert torch.equal(found[name].down, lora.down)


def test_norm_is_that_of_the_change() -> None:
    lora = layer(3, (8, 4, 3, 3), rank=3, alpha=0.5)
    change = 0.5 / 3 * torch.einsum("or,rikl->oikl", lora.up[:, :, 0, 0], lora.down)
    assert lora.weight_shape == tuple(change.shape)
    assert lora.norm() == pytest.approx(float(change.norm()), rel=1e-5)
