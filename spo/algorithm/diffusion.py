"""The arithmetic of sampling, in the variance-exploding (VE) form x = x_0 + sigma * noise.

DDIM with eta (Song et al. 2021, eq. 12 and 16) in its variance-preserving form x_vp = x / sqrt(1 + sigma^2) is the same
transition as the Euler-ancestral step below with the same eta on the same ladder; tests hold the two to 1e-10.

Deliberate difference from the published code: it works in the variance-preserving form of diffusers' DDIM scheduler.
The VE form is what k-diffusion and the WebUI pass around. Log densities differ between the two by the constant
0.5 * log(1 + sigma_next^2), which cancels in every ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.errors import SpoError, nearest

LADDERS = ("ddim", "karras", "exponential", "uniform")


@dataclass(frozen=True)
class AncestralStep:
    """How far a step goes down and how much fresh noise it adds: x' ~ N(mean, up^2), mean on the way to `down`.

    down, up  float64 tensors of the shape of the sigmas they were made from
    """

    down: Tensor
    up: Tensor


def ancestral_step(sigma: Tensor | float, sigma_next: Tensor | float, eta: float) -> AncestralStep:
    """Split a step from noise level sigma to sigma_next <= sigma; eta = 1 is the paper's, eta = 0 deterministic.

    up^2 = eta^2 * sigma_next^2 * (sigma^2 - sigma_next^2) / sigma^2 (DDIM's variance, eq. 16, times 1 + sigma_next^2);
    down^2 = sigma_next^2 - up^2. Any shapes that broadcast; computed in float64.
    """
    current = precise(sigma)
    target = precise(sigma_next).to(current.device)
    variance = target**2 * (current**2 - target**2).clamp(min=0) / current**2
    up = torch.minimum(target, eta * variance.sqrt())
    return AncestralStep((target**2 - up**2).clamp(min=0).sqrt(), up)


def precise(value: Tensor | float) -> Tensor:
    """In float64; on the CPU where the device has none (Apple's MPS)."""
    if isinstance(value, Tensor):
        return (value.cpu() if value.device.type == "mps" else value).double()
    return torch.tensor(value, dtype=torch.float64)


def per_image(value: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1] (a 0-dim tensor stays one) in the device and at least the float32 precision of `like`."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return value.to(dtype).to(like.device).reshape(value.shape + (1,) * (like.ndim - 1) * min(value.ndim, 1))


def transition_mean(x: Tensor, denoised: Tensor, sigma: Tensor, down: Tensor) -> Tensor:
    """Mean of the next latent: the point at noise level `down` on the line from `denoised` through x.

    x, denoised  [N, C, H, W] VE; sigma, down  [N] or 0-dim. Paper eq. 4 (mu_theta) in VE form.
    """
    return denoised + (x - denoised) * per_image(precise(down) / precise(sigma), x)


def transition_log_density(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[N] log N(x_next; mean, std^2), **averaged** over the elements of a latent, float32 at least.

    x_next, mean  [N, C, H, W] VE; std  [N] or 0-dim, above 0. The average over elements (not the sum) is what the
    published code uses, and what beta = 10 and the ratio clamp were set for.
    """
    dtype = torch.float64 if x_next.dtype == torch.float64 else torch.float32
    std = precise(std)
    squared = (x_next.to(dtype) - mean.to(dtype)).square().flatten(1).mean(1)
    weight, constant = -0.5 / std**2, std.log() + 0.5 * math.log(2 * math.pi)
    return squared * weight.to(dtype).to(squared.device) - constant.to(dtype).to(squared.device)


def network_input(x: Tensor, sigma: Tensor) -> Tensor:
    """What a Stable Diffusion network sees: x_vp = x / sqrt(1 + sigma^2). x [N, C, H, W], sigma [N]."""
    return x * per_image((1 + precise(sigma) ** 2).rsqrt(), x)


def denoised_from_output(x: Tensor, output: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The network's raw output as a prediction of the clean latent. x, output [N, C, H, W], sigma [N].

    epsilon:       x - sigma * output
    v_prediction:  x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) * output  (Salimans & Ho 2022, appendix D, in VE form)

    Raises SpoError for any other prediction type.
    """
    s = precise(sigma)
    if prediction_type == "epsilon":
        return x - per_image(s, x) * output
    if prediction_type == "v_prediction":
        return x * per_image(1 / (1 + s**2), x) - per_image(s * (1 + s**2).rsqrt(), x) * output
    raise SpoError(f'prediction type "{prediction_type}" is not known; epsilon and v_prediction are.')


def scaled_linear_alphas_cumprod(start: float = 0.00085, end: float = 0.012, count: int = 1000) -> Tensor:
    """[count] float32 alpha_bar of Stable Diffusion's training schedule."""
    betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def training_sigmas(alphas_cumprod: Tensor) -> Tensor:
    """[T] float64 noise level sqrt((1 - alpha_bar) / alpha_bar) of each training timestep, rising."""
    alphas = precise(alphas_cumprod).clamp(min=1e-12)
    return ((1 - alphas) / alphas).sqrt()


def timestep_of_sigma(sigma: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Float64 training timesteps of noise levels, linear in log sigma between timesteps, clamped to 0 ... T - 1.

    On the levels of the training schedule itself the result is exactly an integer.
    """
    wanted = precise(sigma).clamp(min=1e-12).log()
    logs = training_sigmas(alphas_cumprod).log().to(wanted.device)
    above = torch.searchsorted(logs, wanted - 1e-6).clamp(1, len(logs) - 1)
    low, high = logs[above - 1], logs[above]
    timestep = above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)
    nearest_integer = timestep.round()
    return torch.where((timestep - nearest_integer).abs() < 1e-3, nearest_integer, timestep)


def ddim_timesteps(steps: int, count: int = 1000) -> list[int]:
    """The paper's timesteps: leading spacing, steps_offset 1: 951, 901, ..., 1 for 20 steps."""
    return [index * (count // steps) + 1 for index in reversed(range(steps))]


def sigma_ladder(name: str, steps: int, alphas_cumprod: Tensor) -> Tensor:
    """[steps + 1] float32 falling noise levels.

    ddim         the paper's: timesteps 951 ... 1 and, last, the level of timestep 0 (0.0292, not 0), so that the last
                 transition adds noise and yields a pair, as in the published code
    karras       rho = 7 (Karras et al. 2022, eq. 5), then 0
    exponential  evenly spaced in log sigma, then 0
    uniform      evenly spaced timesteps from 999, then 0 (the WebUI's "Automatic" for Euler a)

    Raises SpoError for an unknown name or a number of steps outside 1 ... 500.
    """
    count = len(alphas_cumprod)
    if not 1 <= steps <= count // 2:
        raise SpoError(f"sampling_steps is {steps}; accepted are 1 to {count // 2}.")
    levels = training_sigmas(alphas_cumprod)
    low, high = levels[0], levels[-1]
    if name == "ddim":
        return levels[torch.tensor([*ddim_timesteps(steps, count), 0])].float()
    if name == "karras":
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        falling = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    elif name == "exponential":
        falling = torch.linspace(float(high.log()), float(low.log()), steps, dtype=torch.float64).exp()
    elif name == "uniform":
        position = torch.linspace(count - 1, 0, steps, dtype=torch.float64)
        below = position.floor().long()
        above = (below + 1).clamp(max=count - 1)
        logs = levels.log()
        falling = (logs[below] + (position - below) * (logs[above] - logs[below])).exp()
    else:
        raise SpoError(
            f'sigma ladder "{name}" is not known; choose one of {", ".join(LADDERS)}{nearest(name, LADDERS)}.'
        )
    return torch.cat([falling, torch.zeros(1, dtype=torch.float64)]).float()


def checked_ladder(sigmas: Sequence[float]) -> Tensor:
    """[steps + 1] float32 ladder of one's own; raises SpoError unless it falls strictly and ends at 0 or above."""
    ladder = torch.tensor(list(sigmas), dtype=torch.float32)
    if len(ladder) < 2 or not bool((ladder[:-1] > ladder[1:]).all()) or float(ladder[-1]) < 0:
        raise SpoError(
            f"sigmas {list(sigmas)} cannot be a ladder; give two or more falling numbers, the last 0 or more."
        )
    return ladder
