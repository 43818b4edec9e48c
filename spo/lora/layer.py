"""One layer of a LoRA: the change of one module's weight, alpha / rank * up @ down."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spo.errors import SpoError


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change of one module's weight: alpha / rank * up @ down.

    down   [rank, in] of a linear layer, [rank, in, kh, kw] of a convolution
    up     [out, rank], or [out, rank, 1, 1]
    alpha  a number; equal to the rank: no scaling
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this changes: (out, in) or (out, in, kh, kw)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def norm(self) -> float:
        """Frobenius norm of the change, float32, without building it."""
        down, up = self.down.float().flatten(1), self.up.float().flatten(1)
        squared = ((down @ down.T) * (up.T @ up)).sum().clamp(min=0)
        return abs(self.alpha) / self.rank * math.sqrt(float(squared))


def with_one_alpha(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """The same LoRA with the most frequent alpha in every layer, the rest of each scale moved into `up`.

    diffusers (0.42) uses only the most frequent alpha for attention layers of a file of kohya's, whatever the others
    say; ranks may differ. Layers without effect (alpha 0) get a zero `up`.
    """
    alphas = Counter(layer.alpha for layer in layers.values() if layer.alpha)
    if not alphas:
        return dict(layers)
    common = alphas.most_common(1)[0][0]
    return {
        name: layer if layer.alpha == common else LoraLayer(layer.down, layer.up * (layer.alpha / common), common)
        for name, layer in layers.items()
    }


def checked_layer(path: Path, name: str, down: Tensor, up: Tensor, alpha: float) -> LoraLayer:
    """The layer, `up` with as many dimensions as `down`. SpoError when they do not belong together."""
    rank = down.shape[0] if down.ndim else 0
    if down.ndim not in (2, 4) or not rank or up.ndim not in (2, down.ndim) or math.prod(up.shape[1:]) != rank:
        raise SpoError(
            f'"{path.name}" has a layer "{name}" whose shapes do not belong together: '
            f"down {list(down.shape)}, up {list(up.shape)}."
        )
    finite = bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all()) and math.isfinite(alpha)
    if not finite:
        raise SpoError(f'"{path.name}" has a layer "{name}" with values that are not finite (NaN or infinite).')
    return LoraLayer(down, up.reshape(up.shape[0], rank, *[1] * (down.ndim - 2)), alpha)
