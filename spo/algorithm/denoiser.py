"""The denoiser: one of the project's three seams. It hides prediction type, guidance and host.

A denoiser is any callable `model(x, sigma, **extra_args) -> denoised`, the signature of k-diffusion's samplers:

    x         [N, C, H, W] noisy latent in the variance-exploding form, x = x_0 + sigma * noise
    sigma     [N] float32 noise levels
    denoised  [N, C, H, W] the (guided) prediction of the clean latent x_0

The WebUI's own CFG denoiser is one already. Headless, `GuidedDenoiser` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.algorithm.diffusion import denoised_from_output, network_input, timestep_of_sigma


@dataclass(frozen=True)
class Conditioning:
    """What a Stable Diffusion network takes besides the latent; row n belongs to latent n.

    cross_attention  [N, L, D] text features
    pooled           [N, P] pooled text features (SDXL), else None
    size_ids         [N, 6] original height, width, crop top, left, target height, width in pixels (SDXL), else None
    """

    cross_attention: Tensor
    pooled: Tensor | None = None
    size_ids: Tensor | None = None

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        def mapped(value: Tensor | None) -> Tensor | None:
            return None if value is None else function(value)

        return Conditioning(function(self.cross_attention), mapped(self.pooled), mapped(self.size_ids))

    def __len__(self) -> int:
        return len(self.cross_attention)

    def repeat(self, count: int) -> Conditioning:
        """The whole batch `count` times over, candidate-major: [count * N, ...]."""
        return self._map(lambda value: value.repeat(count, *[1] * (value.ndim - 1)))

    def rows(self, index: Tensor | Sequence[int]) -> Conditioning:
        """The rows of `index`, [len(index), ...]; a row may be taken several times."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The same on another device, and in another dtype for the text features (sizes stay float32)."""
        moved = self._map(lambda value: value.to(device=device))
        if dtype is None:
            return moved
        pooled = None if moved.pooled is None else moved.pooled.to(dtype)
        return Conditioning(moved.cross_attention.to(dtype), pooled, moved.size_ids)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """One after the other along the batch."""

        def join(values: Sequence[Tensor | None]) -> Tensor | None:
            return None if values[0] is None else torch.cat([value for value in values if value is not None])

        return Conditioning(
            torch.cat([part.cross_attention for part in parts]),
            join([part.pooled for part in parts]),
            join([part.size_ids for part in parts]),
        )


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser over a Stable Diffusion network, with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    predict  raw network: `predict(x_vp [N, C, H, W], timesteps [N], conditioning) -> output [N, C, H, W]`, any dtype
    alphas_cumprod  [1000] the network's training schedule
    prediction_type  "epsilon" or "v_prediction"
    """

    predict: Callable[[Tensor, Tensor, Conditioning], Tensor]
    alphas_cumprod: Tensor
    prediction_type: str

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """[N, C, H, W] float32 denoised. Without `uncond`, or at guidance 1, one evaluation a latent, else two."""
        x_vp = network_input(x, sigma)
        timesteps = timestep_of_sigma(sigma, self.alphas_cumprod).float().to(x.device)
        if uncond is None or guidance_scale == 1:
            output = self.predict(x_vp, timesteps, cond).float()
        else:
            both = self.predict(torch.cat([x_vp] * 2), torch.cat([timesteps] * 2), Conditioning.cat([uncond, cond]))
            without, guided = both.float().chunk(2)
            output = without + guidance_scale * (guided - without)
        return denoised_from_output(x, output, sigma, self.prediction_type)
