"""What can be seen in a picture: how many pixels have a colour, and where."""

from __future__ import annotations

import numpy as np


def pixels_of(image, colour):
    return int((np.asarray(image.convert("RGB")) == colour).all(-1).sum())


def box_of(image, colour):
    """left, top, right, bottom of the pixels of a colour, the last two exclusive."""
    y, x = np.nonzero((np.asarray(image) == colour).all(-1))
    return x.min(), y.min(), x.max() + 1, y.max() + 1
