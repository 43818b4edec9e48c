"""The VAE against the one that it was made of; its precision, what happens when it overflows, tiles, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.errors import SpoError
from spo.headless import vae
from spo.headless.model import DiffusersModel
from spo.headless.vae import Vae, half_dtype, largest_activation
from tests.headless_models import load
from tests.tiny_checkpoints import tiny_sd15

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def latents_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---- pictures


def test_decode_in_batches(sd15: DiffusersModel) -> None:
    latents = latents_of(5, 4, 8, 8)
    pictures = sd15.vae.decode(latents, batch=2)
    assert pictures.shape == (5, 3, 64, 64) and pictures.abs().max() > 1  # not clamped
    assert torch.allclose(pictures, sd15.vae.decode(latents, batch=5), rtol=1e-3, atol=1e-3)


def test_no_more_than_a_megapixel_at_a_time(sd15: DiffusersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = sd15.vae.network.decode
    monkeypatch.setattr(sd15.vae.network, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    monkeypatch.setattr(vae, "PIXELS_AT_A_TIME", 2 * 64 * 64)
    sd15.vae.decode(latents_of(5, 4, 8, 8), batch=4)
    sd15.vae.decode(latents_of(2, 4, 16, 16), batch=4)
    assert sizes == [2, 2, 1, 1, 1]
    assert [len(part) for part in vae.portions(torch.zeros(5, 4, 8, 8), 8, 1)] == [1] * 5


def test_tiles(sd15: DiffusersModel) -> None:
    sizes: list[int] = []
    network = sd15.vae.network
    handle = network.post_quant_conv.register_forward_hook(lambda m, args, output: sizes.append(args[0].shape[-1]))
    wide = latents_of(1, 4, 8, 96)
    whole = sd15.vae.decode(wide)
    assert sd15.vae.lessen() == "pictures decoded in tiles, which may show faint seams" and sd15.vae.tiled
    tiled = sd15.vae.decode(wide)
    assert sd15.vae.lessen() is None
    handle.remove()
    sd15.vae.tiled = False
    assert sizes[0] == 96 and max(sizes[1:]) == 64 and len(sizes) > 2  # all at once, then 512 px a tile
    assert tiled.shape == whole.shape == (1, 3, 64, 768)
    assert (tiled - whole).abs().mean() < 0.2 * whole.abs().mean()


def test_encode(sd15: DiffusersModel) -> None:
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    distribution = tiny_sd15().vae.encode(pixels).latent_dist
    assert torch.allclose(sd15.vae.encode(pixels, batch=2), distribution.mean * 0.18215, atol=1e-6)
    expected = (distribution.mean + distribution.std * noise) * 0.18215
    assert torch.allclose(sd15.vae.encode(pixels, noise=noise), expected, atol=1e-6)


def test_the_encoder_is_read_when_something_is_encoded(sd15_path: Path) -> None:
    model = load(sd15_path)
    assert all(parameter.is_meta for parameter in model.vae.network.encoder.parameters())
    model.vae.encode(torch.zeros(1, 3, 64, 64))
    assert not any(parameter.is_meta for parameter in model.vae.network.parameters())


# ---- precision


class ReadSides:
    """What a `Vae` asks to be read."""

    def __init__(self) -> None:
        self.sides: list[tuple[str, torch.dtype]] = []

    def __call__(self, side: str, device: torch.device, dtype: torch.dtype) -> None:
        self.sides.append((side, dtype))
        self.device = device


def fake_network(decode: Callable[[Tensor], Tensor]) -> Any:
    """A network whose pictures come from a function: not every torch has float16 convolutions on the CPU."""

    def decoded(latents: Tensor) -> Any:
        return SimpleNamespace(sample=decode(latents))

    def encoded(pixels: Tensor) -> Any:
        values = decode(pixels)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=values, std=values))

    return SimpleNamespace(decode=decoded, encode=encoded, enable_tiling=None, disable_tiling=lambda: None)


def overflows_in(*dtypes: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda values: values[:, :3] + (float("nan") if values.dtype in dtypes else 0.25)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["decode", "encode"])
def test_what_is_not_finite_in_half_precision_is_done_again_in_float32(half: torch.dtype, way: str) -> None:
    read = ReadSides()
    made = Vae(fake_network(overflows_in(half)), read, scale_factor=1.0, device=CPU, dtype=half)
    side = f"{way}r" if way == "decode" else "encoder"
    with pytest.warns(UserWarning, match=f"not finite in {str(half)[6:]}: it goes on in float32") as warned:
        values = getattr(made, way)(torch.zeros(3, 4, 8, 8), batch=1)
    assert torch.equal(values, torch.full((3, 3, 8, 8), 0.25)) and len(warned) == 1
    assert made.dtype == torch.float32
    assert read.sides == [(side, half), (side, torch.float32)]  # read again: what was rounded does not come back


def test_a_vae_that_overflows_in_float32_is_an_error() -> None:
    made = Vae(fake_network(overflows_in(torch.float32)), ReadSides(), scale_factor=1.0, device=CPU)
    with pytest.raises(SpoError, match="VAE gives values that are not finite, in float32, too"):
        made.decode(torch.zeros(1, 4, 8, 8))


def test_latents_that_are_not_finite_are_not_the_vae_s_fault(sd15: DiffusersModel) -> None:
    latents = torch.full((1, 4, 8, 8), float("nan"))
    with pytest.raises(SpoError, match="latents are not finite .* before the VAE sees them: the network overflows"):
        sd15.vae.decode(latents)
    assert sd15.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("largest", "bfloat16", "expected"),
    [
        (3_000.0, True, torch.float16),  # SD1.5's, and SDXL's repaired one
        (60_000.0, True, torch.bfloat16),
        (200_000.0, False, torch.float32),  # a card before Ampere
        (float("inf"), True, torch.bfloat16),
    ],
)
def test_half_precision_by_what_the_trial_reaches(
    monkeypatch: pytest.MonkeyPatch, largest: float, bfloat16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bfloat16)
    assert half_dtype(largest, CUDA) == expected


def test_on_a_gpu_a_trial_in_float32_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    read = ReadSides()
    monkeypatch.setattr(vae, "largest_activation", lambda network, device: 100.0)
    made = Vae(fake_network(overflows_in()), read, scale_factor=1.0, device=CUDA)
    assert made.dtype == torch.float16
    assert read.sides == [("decoder", torch.float32), ("decoder", torch.float16)]
    assert Vae(fake_network(overflows_in()), read, scale_factor=1.0, device=CUDA, dtype=torch.bfloat16).dtype == (
        torch.bfloat16
    )


def test_weights_that_rest_come_for_each_picture(sd15_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device than the CPU; here that device is the CPU once more, and only the coming and going is seen."""
    read, awake, calls = ReadSides(), [], []

    class Rest:
        def __init__(self, network: Any, device: torch.device, moves: Callable[[str], bool]) -> None:
            self.name = "float32" if len(read.sides) > 1 else "float16"

        @contextmanager
        def awake(self) -> Iterator[None]:
            awake.append(self.name)
            yield
            awake.pop()

    monkeypatch.setattr(vae, "Resting", Rest)
    network = fake_network(lambda latents: calls.append(list(awake)) or overflows_in(torch.float16)(latents))
    network.named_parameters = lambda: []
    made = Vae(network, read, scale_factor=1.0, device=CUDA, dtype=torch.float16, rest_on_cpu=True)
    made.device = CPU
    with pytest.warns(UserWarning, match="goes on in float32"):
        made.decode(torch.zeros(2, 4, 8, 8), batch=1)
    assert read.device == CPU and not awake
    assert calls == [["float16"], ["float32"], ["float32"]]  # the first picture twice, never two kinds at once


def test_the_trial_sees_what_a_file_s_name_does_not_say(sd15: DiffusersModel) -> None:
    """The repaired VAE was scaled down inside; the same network with one layer scaled up is told apart."""
    usual = largest_activation(sd15.vae.network, CPU)
    assert 1 < usual < 10_000
    layer = sd15.vae.network.decoder.up_blocks[-1].resnets[0].conv1
    layer.weight.data *= 1e5
    try:
        assert largest_activation(sd15.vae.network, CPU) > 100 * usual
    finally:
        layer.weight.data /= 1e5
