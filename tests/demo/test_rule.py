"""The rule of taste, by hand."""

from __future__ import annotations

import pytest
import torch

from spo.demo.rule import colourfulness


def test_the_rule_is_hasler_and_suesstrunks():
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
