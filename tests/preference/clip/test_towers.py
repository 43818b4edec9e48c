"""What all CLIPs share: token ids, sizes read from shapes, prepared pictures."""

from __future__ import annotations

import pytest
import torch

from spo.preference.clip.towers import (
    CLIP_MEAN,
    CLIP_STD,
    prepare_pictures,
    token_ids,
)


def test_long_prompts_are_cut_at_77_tokens():
    ids = token_ids(["cat " * 200, "cat"])
    assert ids.shape == (2, 77)
    assert ids[0, 0] == 49406 and ids[0, -1] == 49407
    assert (ids[0, 1:-1] == ids[1, 1]).all()  # 75 cats between begin and end


def normalized(pictures):
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pictures / 2 + 0.5 - mean) / std


@pytest.mark.parametrize(("length", "start"), [(56, 0), (57, 0), (58, 1), (59, 2), (112, 28)])
def test_the_middle_is_cut_out(length, start):
    """Where the shorter side fits already, nothing is resized; odd rests are halved as Python rounds, half to even."""
    tall = torch.rand(1, 3, length, 56) * 2 - 1
    expected = normalized(tall[:, :, start : start + 56])
    assert torch.allclose(prepare_pictures(tall, 56), expected, atol=1e-6)
    assert torch.allclose(prepare_pictures(tall.mT, 56), expected.mT, atol=1e-6)


def test_values_are_clamped_after_the_resize():
    """Around a sharp edge bicubic overshoots: that is cut off, and values out of range count before."""
    edge = torch.full((1, 3, 8, 8), -1.0)
    edge[..., 4:] = 3.0
    prepared = prepare_pictures(edge, 16)
    white, black = normalized(torch.ones(3, 1, 1)), normalized(-torch.ones(3, 1, 1))
    assert torch.allclose(prepared[0, :, :, -4:], white.expand(3, 16, 4), atol=1e-6)
    assert torch.allclose(prepared[0, :, :, :4], black.expand(3, 16, 4), atol=1e-6)
    clamped_before = prepare_pictures(edge.clamp(-1, 1), 16)
    assert not torch.allclose(prepared, clamped_before, atol=1e-2)
