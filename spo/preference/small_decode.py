"""Decode only as large as the scorer needs: latents are brought down first, which saves most of the VAE's work.

A scorer of 224 pixels sees a 1024 pixel picture brought down to 224 in any case. Bringing the *latents* down first is
not the same picture, so for the first pools both ways are scored and their agreement is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spo.algorithm.preference import Candidates, PreferenceModel

if TYPE_CHECKING:
    from torch import Tensor

SCORER_PX = 224
CHECKED_POOLS = 16


class SmallDecode:
    """A `PreferenceModel` that hands another one pictures of about `SCORER_PX` pixels.

    say  told once, after `CHECKED_POOLS` pools, how often best and worst are those of the full decode
    """

    needs_pixels = True
    needs_denoised = True

    def __init__(self, model: PreferenceModel, say: Callable[[str], object], image_px: int = SCORER_PX) -> None:
        self.model, self.say, self.image_px = model, say, image_px
        self.name = model.name
        self.checked, self.same_best, self.same_worst = 0, 0.0, 0.0

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B]; see `PreferenceModel`."""
        small = replace(candidates, decode=lambda latents: candidates.decode(shrunk(latents, self.image_px)))
        scores = self.model.score(small, prompts)
        if self.checked < CHECKED_POOLS and min(candidates.x.shape[-2:]) * 8 > self.image_px:
            self._compare(scores, self.model.score(candidates, prompts))
        return scores

    def _compare(self, small: Tensor, full: Tensor) -> None:
        self.checked += 1
        self.same_best += float((small.argmax(0) == full.argmax(0)).float().mean())
        self.same_worst += float((small.argmin(0) == full.argmin(0)).float().mean())
        if self.checked == CHECKED_POOLS:
            self.say(
                f"Small decode against full, first {self.checked} pools: the same best candidate in "
                f"{self.same_best / self.checked:.0%}, the same worst in {self.same_worst / self.checked:.0%} of them."
            )


def shrunk(latents: Tensor, image_px: int) -> Tensor:
    """[N, C, h, w] -> the same pictures with the shorter side `image_px` pixels after decoding; never enlarged.

    Bicubic with antialiasing. Each latent keeps its place: a side of n latents stands for 8 n pixels.
    """
    from torch.nn import functional

    height, width = latents.shape[-2:]
    scale = image_px / (8 * min(height, width))
    if scale >= 1:
        return latents
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return functional.interpolate(latents.float(), size, mode="bicubic", antialias=True).to(latents.dtype)
