"""Where a preference model computes, and in what."""

from __future__ import annotations

import pytest
import torch

from spo.errors import SpoError
from spo.preference.placement import placement, without_autocast


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


def test_autocast_is_off_inside_and_left_alone_where_there_is_none():
    product = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
        assert (product @ product).dtype == torch.float32
    with without_autocast(torch.device("mps")):
        assert (product @ product).dtype == torch.float32
