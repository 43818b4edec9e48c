"""The preference model: one of the project's three seams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """One pool of K candidates for B images, all at one noise level.

    x         [K, B, C, H, W] noisy latents, variance-exploding form
    sigma     the noise level of x, the same for all
    timestep  that noise level on the model's training schedule, 0 ... 999 (paper: t)
    denoised  [K, B, C, H, W] the guided prediction of the clean latent at (x, sigma); None where it was not evaluated,
              `needs_denoised` being off. Of the last pool, the finished latents (see `rollout`)
    decode    [N, C, H, W] latents -> [N, 3, 8 H, 8 W] pictures about [-1, 1], float32; not clamped, since the published
              scorer clamps after its resize
    text      [B, D] the checkpoint's own feature of each image's prompt, as far as it is known (`Host.text_features`)
    """

    x: Tensor
    sigma: float
    timestep: float
    denoised: Tensor | None
    decode: Callable[[Tensor], Tensor]
    text: Tensor | None = None

    def prediction(self) -> Tensor:
        """`denoised`, for a preference model that needs it. Raises ValueError where it was not evaluated."""
        if self.denoised is None:
            raise ValueError("the clean latents were not predicted: the preference model has needs_denoised off")
        return self.denoised

    @cached_property
    def _decoded(self) -> Tensor:
        denoised = self.prediction()
        return self.decode(denoised.flatten(0, 1)).unflatten(0, denoised.shape[:2])

    def pixels(self) -> Tensor:
        """[K, B, 3, height, width] decoded `denoised`, about [-1, 1], float32; decoded at the first call only."""
        return self._decoded


class PreferenceModel(Protocol):
    """Scores candidates; a higher score is preferred. Differences of scores are log-odds (Bradley-Terry).

    name          what the interface and the file metadata call it
    needs_pixels  whether `score` calls `candidates.pixels()`; a rollout without it needs no VAE
    needs_denoised  whether `score` looks at `candidates.denoised` or its pixels; a rollout without it evaluates the
                  network only for the candidate that goes on
    """

    name: str
    needs_pixels: bool
    needs_denoised: bool

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32 scores of the candidates for their prompts (len(prompts) == B), no gradient."""
        ...
