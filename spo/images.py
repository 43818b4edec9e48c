"""Tensors to pictures and back, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def to_picture(pixels: Tensor) -> Image:
    """[3, H, W] in [-1, 1] -> an RGB picture."""
    from PIL import Image

    bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy())
