"""Pixels as pictures."""

from __future__ import annotations

import numpy as np
import torch

from spo.images import to_picture


def test_every_shade_has_its_byte():
    """-1 is 0, 1 is 255, 0 is the even one of 127 and 128; what is outside the range is brought to its ends."""
    pixels = torch.tensor([-1.0, 1.0, 0.0, -1.5, 2.0, 1 / 255]).expand(3, 2, 6)
    picture = to_picture(pixels)
    assert (picture.mode, picture.size) == ("RGB", (6, 2))
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 255, 128, 0, 255, 128]


def test_channels_rows_and_columns_keep_their_places():
    pixels = torch.full((3, 2, 3), -1.0)
    pixels[1, 1, 2] = 1
    picture = np.asarray(to_picture(pixels))
    assert picture.shape == (2, 3, 3)
    assert np.argwhere(picture == 255).tolist() == [[1, 2, 1]]
