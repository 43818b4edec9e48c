"""Statistics of pictures, by hand and against colorsys; those between pictures against closed forms."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch

from spo.evaluation.measures import (
    colourfulness,
    contrast,
    cosine_distance,
    diversity,
    drift,
    rms_distance,
    saturation,
    sharpness,
    squared_distance,
)


def noise(count=3, height=5, width=7, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_colourfulness_is_hasler_and_suesstrunks():
    grey = torch.zeros(1, 3, 4, 4)
    red = torch.full((1, 3, 4, 4), -1.0)
    red[:, 0] = 1
    half = torch.cat([red[..., :2], -torch.ones(1, 3, 4, 2)], dim=3)  # half red, half black
    values = colourfulness(torch.cat([grey, red, half]))
    # red: rg = 255, yb = 127.5 everywhere, no spread: 0.3 sqrt(255^2 + 127.5^2)
    assert float(values[0]) == 0
    assert float(values[1]) == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5, rel=1e-5)
    # half: spread sqrt(127.5^2 + 63.75^2), means halved
    spread = (127.5**2 + 63.75**2) ** 0.5
    assert float(values[2]) == pytest.approx(1.3 * spread, rel=1e-5)


def test_saturation_is_the_mean_of_colorsys():
    pixels = noise()
    pixels[0, :, 0, 0] = -1  # black has none
    unit = ((pixels + 1) / 2).permute(0, 2, 3, 1).numpy()
    expected = [np.mean([colorsys.rgb_to_hsv(*map(float, pixel))[1] for pixel in p.reshape(-1, 3)]) for p in unit]
    assert saturation(pixels).tolist() == pytest.approx(expected, rel=1e-5)


def test_contrast_is_the_deviation_of_luma():
    pixels = noise()
    luma = np.einsum("nchw,c->nhw", ((pixels + 1) / 2).numpy(), [0.299, 0.587, 0.114])
    assert contrast(pixels).tolist() == pytest.approx(luma.reshape(3, -1).std(1).tolist(), rel=1e-5)
    board = torch.ones(1, 3, 2, 2)
    board[..., 0, 0] = board[..., 1, 1] = -1
    assert float(contrast(board)) == pytest.approx(0.5)


def test_pictures_in_half_precision_are_measured_in_float32():
    for measure in (colourfulness, saturation, contrast):
        assert measure(noise().half()).dtype == torch.float32
        assert measure(noise().half()).tolist() == pytest.approx(measure(noise()).tolist(), rel=1e-2)


def test_distances_by_hand():
    first, second = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert rms_distance(first, second).tolist() == pytest.approx([math.sqrt(12.5), math.sqrt(2.5)])
    assert squared_distance(first, second).tolist() == pytest.approx([25, 5])
    assert cosine_distance(first, first + 0).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert cosine_distance(first[1:], second[1:]).tolist() == pytest.approx([1])


def test_diversity_is_the_mean_over_the_pairs_of_each_group():
    features = torch.tensor([[0.0], [10.0], [1.0], [10.0], [5.0]])
    found = diversity(features, ["a", "b", "a", "b", "c"], rms_distance)
    assert found[:2].tolist() == [1.0, 0.0] and found[2].isnan()
    three = torch.tensor([[0.0], [1.0], [3.0]])
    assert diversity(three, [7, 7, 7], rms_distance).tolist() == pytest.approx([(1 + 3 + 2) / 3])


def test_diversity_of_unit_vectors_has_a_closed_form():
    """Mean of 1 - cosine over the pairs: (n^2 - |sum|^2) / (n (n - 1))."""
    features = torch.nn.functional.normalize(torch.randn(6, 9, generator=torch.Generator().manual_seed(1)), dim=1)
    expected = (36 - float(features.sum(0).square().sum())) / 30
    assert float(diversity(features, [0] * 6)) == pytest.approx(expected, rel=1e-5)


def test_drift_is_picture_by_picture():
    base, other = torch.zeros(2, 4), torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    assert drift(base, other, rms_distance).tolist() == [0.0, 1.0]


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 groups for 3"):
        diversity(torch.zeros(3, 2), [0, 1])
    with pytest.raises(ValueError, match="features"):
        drift(torch.zeros(3, 2), torch.zeros(2, 2))


def test_sharpness_is_the_laplacians_factor_of_a_wave():
    """Four whole waves across, so that inner pixels have the whole's variance but for a little."""
    across = torch.cos(2 * math.pi * 4 * torch.arange(128) / 128)
    wave = 0.8 * across.expand(1, 3, 128, 128)
    factor = 2 - 2 * math.cos(2 * math.pi * 4 / 128)
    assert float(sharpness(wave)) == pytest.approx(factor, rel=0.01)
    assert float(sharpness(torch.full((1, 3, 8, 8), 0.3))) == 0
