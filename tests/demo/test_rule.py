"""The rules of taste are measures of the evaluation's, which are tested by hand there."""

from __future__ import annotations

import torch

from spo.demo.rule import RULES, colourfulness


def test_the_more_colourful_picture_is_preferred():
    grey, red = torch.zeros(1, 3, 4, 4), torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    half = (grey + red) / 2
    assert colourfulness(grey) < colourfulness(half) < colourfulness(red)
    assert RULES["colourfulness"] is colourfulness


def test_the_second_rule_prefers_the_sharp_picture_whatever_its_colours():
    edge = torch.full((1, 3, 32, 32), -0.5)
    edge[:, :, 8:24, 8:24] = torch.tensor([0.8, -0.4, -0.1]).view(1, 3, 1, 1)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(edge, (1, 1, 1, 1), "replicate"), 3, 1)
    luma = (edge * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    rule = RULES["sharpness"]
    assert rule(blurred) < 0.8 * rule(edge)
    torch.testing.assert_close(rule(luma.expand(-1, 3, -1, -1)), rule(edge), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rule(0.5 * edge), rule(edge), rtol=1e-4, atol=1e-4)
