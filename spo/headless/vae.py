"""Latents to pictures and back: the checkpoint's VAE, in the lowest precision that gives finite pictures.

On a GPU the decoder computes in float16 where a trial shows that its activations leave room, as those of SD1.5 and of
the repaired SDXL VAE do, in bfloat16 where they do not (SDXL's own), and in float32, from then on, when a picture is
not finite all the same; the WebUI falls back likewise. On a CPU it computes in float32. The encoder is read when
something is encoded for the first time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spo.errors import SpoError
from spo.resting import Resting

PIXELS_AT_A_TIME = 2**20  # one picture of 1024 x 1024, four of 512 x 512
OUT_OF_MEMORY_ADVICE = "take smaller pictures, a TAESD decoder (taesd), or free memory that other programs hold"
_ROOM = 4  # a real picture may reach this many times what the trial's reaches

Side = Literal["decoder", "encoder"]


class Vae:
    """A Stable Diffusion VAE, frozen, in eval mode. Latents are the UNet's: the VAE's times `scale_factor`.

    network  diffusers' AutoencoderKL, on the meta device but for the sides that were read
    dtype    that it computes in; float32 for good after something that was not finite
    tiled    decode what is larger than 512 px in overlapping tiles: less memory, faint seams
    """

    def __init__(
        self,
        network: Any,
        read: Callable[[Side, torch.device, torch.dtype], None],
        *,
        scale_factor: float,
        device: torch.device,
        dtype: torch.dtype | None = None,
        tiled: bool = False,
        rest_on_cpu: bool = False,
    ) -> None:
        """read   gives the network the weights of a side, on a device, in a dtype
        dtype  None: what a trial finds on a GPU, float32 on a CPU
        rest_on_cpu  weights wait in main memory and come to the device for each call"""
        self.network = network
        self.scale_factor = scale_factor
        self.device = device
        self.tiled = tiled
        self._read = read
        self._rests = rest_on_cpu and device.type != "cpu"
        self._resting: Resting | None = None
        self._sides: set[Side] = set()
        self.dtype = dtype or torch.float32
        if dtype is None and device.type != "cpu":
            self.use("decoder")
            with self._awake():
                largest = largest_activation(network, device)
            self._change_dtype(half_dtype(largest, device))

    def use(self, side: Side) -> None:
        """Read the weights of that side unless they are here."""
        if side in self._sides:
            return
        self._read(side, torch.device("cpu") if self._rests else self.device, self.dtype)
        self._sides.add(side)
        if self._rests:
            here = {name for name, value in self.network.named_parameters() if not value.is_meta}
            self._resting = Resting(self.network, self.device, here.__contains__)

    def _awake(self) -> AbstractContextManager[None]:
        return nullcontext() if self._resting is None else self._resting.awake()

    def _change_dtype(self, dtype: torch.dtype) -> None:
        """From now on; what is here is read again, since what was rounded does not come back."""
        self.dtype = dtype
        sides, self._sides = self._sides, set()
        for side in sides:
            self.use(side)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 4) -> Tensor:
        """[N, 4, h, w] latents of any float dtype -> [N, 3, 8 h, 8 w] pictures about [-1, 1], not clamped, float32.

        batch  at most this many at once, and no more than `PIXELS_AT_A_TIME`

        Raises SpoError for latents that are not finite, and for pictures that are not finite in float32 either.
        """
        self.use("decoder")
        return torch.cat([self._decode(portion) for portion in portions(latents, 8, batch)])

    def _decode(self, latents: Tensor) -> Tensor:
        (self.network.enable_tiling if self.tiled else self.network.disable_tiling)()
        scaled = latents.to(self.device, torch.float32) / self.scale_factor
        with self._awake():
            pictures = self.network.decode(scaled.to(self.dtype)).sample.float()
        if is_finite(pictures):
            return pictures
        self._fall_back(latents, "latents")
        return self._decode(latents)

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, noise: Tensor | None = None, batch: int = 4) -> Tensor:
        """[N, 3, 8 h, 8 w] pictures in [-1, 1] -> [N, 4, h, w] float32 latents on the device.

        The mean of the VAE's distribution, or a sample of it when standard normal `noise` [N, 4, h, w] is given.
        Raises SpoError as `decode` does.
        """
        self.use("encoder")
        mean, std = torch.cat([self._encode(portion) for portion in portions(pixels, 1, batch)], dim=1)
        sample = mean if noise is None else mean + std * noise.to(mean)
        return sample * self.scale_factor

    def _encode(self, pixels: Tensor) -> Tensor:
        with self._awake():
            distribution = self.network.encode(pixels.to(self.device, self.dtype)).latent_dist
            encoded = torch.stack([distribution.mean, distribution.std]).float()
        if is_finite(encoded):
            return encoded
        self._fall_back(pixels, "pictures")
        return self._encode(pixels)

    def _fall_back(self, given: Tensor, name: str) -> None:
        """To float32, once; SpoError when that cannot help."""
        if not is_finite(given):
            raise SpoError(
                f"The {name} are not finite (NaN or infinite) before the VAE sees them: the network overflows; take "
                "precision bfloat16 or float32, or a smaller LoRA weight."
            )
        if self.dtype == torch.float32:
            raise SpoError(
                "The VAE gives values that are not finite, in float32, too: it is damaged; give another one."
            )
        half = str(self.dtype).removeprefix("torch.")
        warnings.warn(f"The VAE gave values that are not finite in {half}: it goes on in float32.", stacklevel=2)
        self._change_dtype(torch.float32)

    def lessen(self) -> str | None:
        """Take less memory; says how, or None when there is nothing left to do."""
        if self.tiled:
            return None
        self.tiled = True
        return "pictures decoded in tiles, which may show faint seams"

    def memory_bytes(self) -> int:
        """Bytes of the weights that were read, wherever they are."""
        is_fake = self.device.type == "meta"
        return sum(t.numel() * t.element_size() for t in self.network.parameters() if is_fake or not t.is_meta)


def half_dtype(largest: float, device: torch.device) -> torch.dtype:
    """float16 where activations up to `largest` in a trial leave room, else bfloat16, or float32 where that is not."""
    if largest * _ROOM < torch.finfo(torch.float16).max:
        return torch.float16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float32
    return torch.bfloat16


@torch.no_grad()
def largest_activation(network: Any, device: torch.device) -> float:
    """The largest magnitude that any module of a VAE's decoder gives, in float32, for a trial picture of 256 px.

    SDXL's own VAE overflows float16 in the decoder's late blocks, the repaired one ("fp16-fix") was made not to; the
    trial tells them apart whatever their files are called.
    """
    largest = 0.0

    def note(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, float(output.abs().max()))

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 32, 32, generator=generator) + 2 * torch.randn(1, 4, 1, 1, generator=generator)
    hooks = [module.register_forward_hook(note) for module in network.decoder.modules()]
    try:
        network.decode((latents / network.config.scaling_factor).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(values).all())


def portions(values: Tensor, scale: int, batch: int) -> tuple[Tensor, ...]:
    """[N, C, h, w] in parts of at most `batch` and at most `PIXELS_AT_A_TIME`; scale: pixels for each of h and w."""
    pixels = values.shape[-2] * values.shape[-1] * scale**2
    return values.split(max(1, min(batch, PIXELS_AT_A_TIME // pixels)))
