"""Statistics of finished pictures: colours, contrast, the variety between seeds, the distance from the base.

Colours and contrast are one number a picture. Diversity and drift are distances between pictures, taken between
features of them: [N, D] of any origin (`features` has some), under a distance that suits these.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # [M, D], [M, D] -> [M], 0 for equal ones

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


# ---------------------------------------------------------------------------------------------- one picture


def colourfulness(pixels: Tensor) -> Tensor:
    """Colourfulness of pictures on the 0 to 255 scale: 0 is grey, 15 slightly, 45 averagely, 82 highly
    colourful (table 2 there).

    With rg = R - G and yb = (R + G) / 2 - B over all pixels of a picture:

        M = sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)

    Source: D. Hasler and S. Suesstrunk, Measuring colourfulness in natural images, Proc. SPIE 5007 (2003), the
    metric M^(3). Variances are the population's.

    pixels: [N, 3, H, W] in [-1, 1], RGB. Returns float32 [N].
    """
    red, green, blue = ((pixels.float() + 1) * 127.5).flatten(2).unbind(1)
    rg = red - green
    yb = 0.5 * (red + green) - blue
    spread = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    return spread + 0.3 * (rg.mean(1).square() + yb.mean(1).square()).sqrt()


def saturation(pixels: Tensor) -> Tensor:
    """Mean saturation of HSV, (max - min) / max of a pixel's three values in 0 ... 1, black counting 0: 0 is grey.

    pixels: [N, 3, H, W] in [-1, 1], RGB. Returns float32 [N], 0 ... 1.
    """
    values = (pixels.float().clamp(-1, 1) + 1) / 2
    high, low = values.amax(1), values.amin(1)
    return torch.where(high > 0, (high - low) / high.clamp(min=1e-12), torch.zeros_like(high)).mean((1, 2))


def contrast(pixels: Tensor) -> Tensor:
    """RMS contrast: the population's standard deviation of luma (BT.601) over a picture, 0 (flat) ... 0.5.

    Peli, Contrast in complex images, J. Opt. Soc. Am. A 7 (1990).

    pixels: [N, 3, H, W] in [-1, 1], RGB. Returns float32 [N].
    """
    return _luma(pixels).flatten(1).std(1, correction=0)


def sharpness(pixels: Tensor) -> Tensor:
    """Root mean square of the Laplacian of luma over its contrast: how fine what a picture shows is, 0 (flat) ... 8.

    The five-point Laplacian over the inner pixels; that of a wave cos(k x) is 2 - 2 cos k times the wave, and so is the
    sharpness. Strength of colours and of contrast do not change it; blur lowers it. The energy of the Laplacian is an
    old measure of focus (Subbarao, Choi and Nikzad, Focusing techniques, Optical Engineering 32, 1993).

    pixels: [N, 3, H, W] in [-1, 1], RGB, 3 x 3 or more. Returns float32 [N].
    """
    luma = _luma(pixels)
    inner = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    energy = (around - 4 * inner).square().mean((1, 2))
    variance = luma.flatten(1).var(1, correction=0)
    return torch.where(variance > 1e-8, energy / variance.clamp(min=1e-8), torch.zeros_like(energy)).sqrt()


def _luma(pixels: Tensor) -> Tensor:
    """[N, H, W] 0 ... 1 of pixels [N, 3, H, W] in [-1, 1]."""
    values = (pixels.float().clamp(-1, 1) + 1) / 2
    return (values * values.new_tensor(_LUMA)[:, None, None]).sum(1)


# ---------------------------------------------------------------------------------------------- between pictures


def rms_distance(first: Tensor, second: Tensor) -> Tensor:
    """Root of the mean squared difference of features: [M, D], [M, D] -> [M]."""
    return (first.float() - second.float()).square().mean(1).sqrt()


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - cosine of features, 0 ... 2: [M, D], [M, D] -> [M]."""
    return 1 - torch.nn.functional.cosine_similarity(first.float(), second.float(), dim=1)


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Sum of squared differences of features: [M, D], [M, D] -> [M]."""
    return (first.float() - second.float()).square().sum(1)


def diversity(features: Tensor, groups: Sequence[Hashable], distance: Distance = cosine_distance) -> Tensor:
    """How much the pictures of one group (the seeds of a prompt) differ: their mean distance, over all pairs of them.

    features: [N, D]; groups: N of them, equal ones belong together. Returns float32 [G] in the order in which the
    groups appear first; NaN for a group of one picture.
    """
    if len(groups) != len(features):
        raise ValueError(f"{len(groups)} groups for {len(features)} pictures")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    means = []
    for rows in members.values():
        first, second = torch.triu_indices(len(rows), len(rows), 1)
        some = features[rows]
        means.append(distance(some[first], some[second]).mean())  # the mean of nothing is NaN
    return torch.stack(means)


def drift(base: Tensor, other: Tensor, distance: Distance = cosine_distance) -> Tensor:
    """How far each picture went from the base's of the same prompt and seed: [N, D], [N, D] features -> [N]."""
    if base.shape != other.shape:
        raise ValueError(f"features {tuple(base.shape)} of the base against {tuple(other.shape)}")
    return distance(base, other)
