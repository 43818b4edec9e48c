"""A taste without training: a taste head's gradient bends the denoiser's prediction at every step.

Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2) moves the prediction by the gradient of a
classifier's log-probability at the noisy picture. A taste head is such a classifier, of the noisy latent: it gives the
log-odds s(x, sigma) that a picture is preferred. With x = x_0 + sigma * noise,

    denoised' = denoised + strength * FULL * (sigma / sqrt(1 + sigma^2)) * g / rms(g),    g = ds(x, sigma) / dx

Deliberate difference from classifier guidance: g is brought to a root mean square of 1, each picture by itself, and the
factor before it says how far the prediction moves, in units of the latents' own deviation (about 1). A head's log-odds
have a scale of their own that says how many votes it had, not how far to go; so one strength means the same with every
head, checkpoint, size and step. The sigma / sqrt(1 + sigma^2) is the share of noise in what the network sees: near the
end the prediction moves by nearly nothing. Above `NOISIEST`, where heads are hardly better than chance (docs/taste.md),
nothing is moved: that is two steps of five, and most of a head's cost on a small network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from spo.algorithm.diffusion import network_input, per_image, precise
from spo.algorithm.preference import PreferenceModel
from spo.errors import SpoError
from spo.preference.placement import without_autocast
from spo.preference.taste.head import LATENT_CHANNELS, TasteHead

FULL = 0.2  # root mean square of what strength 1 adds to the prediction at much noise
NOISIEST = 2.4  # sigma of timestep 600
MAX_STRENGTH = 2.0  # beyond it pictures break (docs/taste.md)


@dataclass(frozen=True)
class Steering:
    """How predictions are bent.

    strength  0 (not at all) to `MAX_STRENGTH`; below 0: away from what is preferred
    text      [N, D] features of the prompts of the N latents (`Host.text_features`), for a head that reads them
    """

    head: TasteHead
    strength: float
    text: Tensor | None = None

    def shift(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What to add to the prediction of the clean latent, [N, C, H, W] float32, no gradient.

        x [N, 4, H, W] VE latents; sigma [N] above 0. Raises SpoError for latents of other channels or not finite.
        """
        if bool((sigma > NOISIEST).all()):
            return torch.zeros_like(x, dtype=torch.float32)
        direction = self._gradient(x, sigma)
        size = direction.square().flatten(1).mean(1).sqrt()
        if not bool(torch.isfinite(size).all()):
            raise SpoError(
                f'The taste head "{self.head.name}" has no finite gradient at sigma {float(sigma[0]):.3g}: the latents '
                "are not finite, or too small for it; use another VAE or precision, larger pictures, or less strength."
            )
        length = self.strength * full_length(sigma).to(size) / size.clamp(min=torch.finfo(size.dtype).tiny)
        length = torch.where(sigma.to(size) > NOISIEST, 0.0, length)
        return direction * per_image(length, direction)

    def _gradient(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[N, 4, H, W] float32: the gradient of the ensemble's mean score, whatever the caller's modes are.

        Up to a positive factor of each picture, which its length loses anyway: it is taken at the latent as the head
        sees it. Samplers run without gradients, some callers in inference mode, whose tensors no gradient can go
        through: so a copy is made outside of it. Half precision is left, since squares of small gradients vanish in it.
        """
        if x.shape[1] != LATENT_CHANNELS:
            raise SpoError(
                f'The taste head "{self.head.name}" reads latents of {LATENT_CHANNELS} channels, and these have '
                f"{x.shape[1]}; use it with SD1.5 or SDXL."
            )
        with torch.inference_mode(False), torch.enable_grad(), without_autocast(x.device):
            level = sigma.detach().clone().float().to(x.device)
            seen = network_input(x.detach().clone().float(), level).requires_grad_()
            codes = self.head.prompt_codes(None if self.text is None else self.text.clone(), x.device)
            return torch.autograd.grad(self._scores(seen, level, codes).mean(0).sum(), seen)[0]

    def _scores(self, latents: Tensor, sigma: Tensor, codes: Tensor | None) -> Tensor:
        """[members, N]. All members at once: on few small latents the calls cost more than the arithmetic."""
        weights = {name: tensor.to(latents.device) for name, tensor in self._weights.items()}
        network = self.head.members[0]

        def score(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(network, weights, (latents, sigma, codes))

        return vmap(score)(weights)

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        """[members, ...] of each weight."""
        weights, buffers = stack_module_state(list(self.head.members))
        return {name: tensor.detach() for name, tensor in {**weights, **buffers}.items()}


def full_length(sigma: Tensor) -> Tensor:
    """[N] float64 root mean square of what strength 1 adds to the prediction, wherever it adds anything."""
    level = precise(sigma)
    return FULL * level / (1 + level**2).sqrt()


def steering(model: PreferenceModel, strength: float, text: Tensor | None = None) -> Steering:
    """Steering by a loaded model; text as in `Steering`.

    Raises SpoError for a model that does not read noisy latents, and for a strength that is out of range.
    """
    if not isinstance(model, TasteHead):
        raise SpoError(
            f'"{model.name}" cannot steer: the gradient of its score would go through the network or the VAE; '
            "steer with a taste head, or choose among candidates with this model."
        )
    if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:  # NaN, too
        raise SpoError(f"strength is {strength}; accepted are {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}.")
    return Steering(model, strength, text)


def steered(model: Callable[..., Tensor], by: Steering) -> Callable[..., Tensor]:
    """The denoiser `model(x, sigma, **extra_args) -> denoised` with its prediction bent."""

    def denoise(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised = model(x, sigma, **extra_args)
        return denoised + by.shift(x, sigma).to(denoised.dtype)

    return denoise
