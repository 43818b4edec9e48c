"""Where a preference model computes, and in what."""

from __future__ import annotations

import pytest
import torch

from spo.errors import SpoError
from spo.preference.placement import placement


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        ("cpu", "auto", torch.float32),
        ("meta", "auto", torch.float16),  # stands for a GPU
        ("meta", "float32", torch.float32),
        ("cpu", "bfloat16", torch.bfloat16),
    ],
)
def test_auto_is_half_on_a_gpu(device, precision, dtype):
    place = placement(device, precision)
    assert (place.device, place.dtype, place.rests) == (torch.device(device), dtype, False)


def test_on_a_cpu_nothing_rests():
    assert placement("meta", rest_on_cpu=True).rests and not placement("cpu", rest_on_cpu=True).rests


def test_an_unknown_precision_is_refused():
    with pytest.raises(SpoError, match='preference_precision is "half"; accepted are auto, float32'):
        placement("cpu", "half")
