"""Text to pictures with the networks as they are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recipes.demo_checkpoint.networks import (
    SCALE_FACTOR,
    alphas_cumprod,
    encode_text,
    load_networks,
    load_vae,
    tokenize,
)
from recipes.demo_checkpoint.options import Options


class Sampler:
    """Text to pictures with the checkpoint's networks: DDIM with eta 1, 20 steps, guidance 5."""

    def __init__(self, options: Options):
        self.unet, self.text_encoder = load_networks(options.work)
        self.vae = load_vae(options.work)
        self.tokenizer_folder = options.tokenizer
        self.alpha_bar = alphas_cumprod().float()

    def of_each(self, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """Pixels [prompts, seeds, 3, 64, 64] in [-1, 1]: every prompt with every seed."""
        rows = [(prompt, seed) for prompt in prompts for seed in seeds]
        flat = self.pictures([prompt for prompt, _ in rows], [seed for _, seed in rows])
        return flat.unflatten(0, (len(prompts), len(seeds)))

    @torch.no_grad()
    def pictures(self, prompts: list[str], seeds: list[int], guidance_scale: float = 5.0) -> torch.Tensor:
        """Pixels [N, 3, 64, 64] in [-1, 1]: picture i shows prompts[i], its noise comes from seeds[i]."""
        starts = range(0, len(prompts), 64)
        return torch.cat([self._batch(prompts[i : i + 64], seeds[i : i + 64], guidance_scale) for i in starts])

    def _batch(self, prompts: list[str], seeds: list[int], guidance_scale: float) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens = tokenize(self.tokenizer_folder, [*prompts, *[""] * len(prompts)])
        context = encode_text(self.text_encoder, tokens)
        x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
        for t in range(951, 0, -50):
            conditional, empty = self.unet(torch.cat([x, x]), torch.tensor(t), context).sample.chunk(2)
            epsilon = empty + guidance_scale * (conditional - empty)
            x = self._ddim_step(x, epsilon, t, torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]))
        return self.vae.decode(x / SCALE_FACTOR).sample.clamp(-1, 1)

    def _ddim_step(self, x: torch.Tensor, epsilon: torch.Tensor, t: int, noise: torch.Tensor) -> torch.Tensor:
        """One step of Song et al. 2021, equation 12, eta 1, from t to t - 50 (in the end to entry 0)."""
        a, a_next = self.alpha_bar[t], self.alpha_bar[max(t - 50, 0)]
        denoised = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        variance = (1 - a_next) / (1 - a) * (1 - a / a_next)
        direction = (1 - a_next - variance).clamp(min=0).sqrt() * epsilon
        return a_next.sqrt() * denoised + direction + variance.sqrt() * noise
