"""TAESD decoders in both layouts, against diffusers' AutoencoderTiny and the original's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spo.errors import SpoError
from spo.headless.taesd import load_taesd
from tests.headless_models import load
from tests.tiny_checkpoints import tiny_sd15, write_vae

CPU = torch.device("cpu")


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def original(latent_channels: int = 4) -> nn.Sequential:
    """github.com/madebyollin/taesd: the layers of its decoder, whose pictures are in [0, 1]."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent_channels, 64, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [Block(), Block(), Block(), nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(), nn.Conv2d(64, 3, 3, padding=1)).requires_grad_(False)


def latents() -> Tensor:
    return 2 * torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_the_original_layout(tmp_path: Path, ending: str) -> None:
    network, path = original(), tmp_path / f"taesd_decoder.{ending}"
    if ending == "pth":
        torch.save(network.state_dict(), path)
    else:
        save_file(network.state_dict(), path)
    pictures = load_taesd(path, CPU, torch.float32).decode(latents(), batch=2)
    assert pictures.shape == (3, 3, 32, 48)
    assert torch.allclose(pictures, network(latents()) * 2 - 1, atol=1e-5)


def test_diffusers_layouts(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    sizes = {"block_out_channels": (16,) * 4, "num_blocks": (1,) * 4}
    for name, options in {
        "full": {},
        "small": {f"{side}_{key}": value for side in ("decoder", "encoder") for key, value in sizes.items()},
    }.items():
        options = {key.replace("coder_num_blocks", "coder_blocks"): value for key, value in options.items()}
        options = {(f"num_{key}" if key.endswith("_blocks") else key): value for key, value in options.items()}
        tiny = AutoencoderTiny(**options).eval()
        tiny.save_pretrained(tmp_path / name)
        expected = tiny.decode(latents()).sample
        decoder = load_taesd(tmp_path / name, CPU, torch.float32)
        assert torch.allclose(decoder.decode(latents()), expected, atol=1e-6)
        assert decoder.lessen() is None and decoder.memory_bytes() == 4 * sum(
            parameter.numel() for parameter in tiny.decoder.parameters()
        )
    file = tmp_path / "full" / "diffusion_pytorch_model.safetensors"
    assert load_taesd(file, CPU, torch.float32).decode(latents()).shape == (3, 3, 32, 48)


def test_it_decodes_in_the_vae_s_place(tmp_path: Path, sd15_path: Path) -> None:
    save_file(original().state_dict(), tmp_path / "taesd_decoder.safetensors")
    model = load(sd15_path, taesd_path=tmp_path / "taesd_decoder.safetensors")
    x = torch.zeros(1, 4, 8, 8)
    assert torch.allclose(model.decoder.decode(x), original()(x) * 2 - 1, atol=1e-5)
    assert all(parameter.is_meta for parameter in model.vae.network.parameters())  # not read: it is not needed
    assert model.memory_bytes() == 4 * model.info.unet_parameters + model.decoder.memory_bytes()
    assert torch.allclose(
        model.vae.encode(torch.zeros(1, 3, 64, 64)), load(sd15_path).vae.encode(torch.zeros(1, 3, 64, 64))
    )


def test_other_files_are_refused(tmp_path: Path, sd15_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(SpoError, match=message):
            load(sd15_path, taesd_path=path)

    refused(tmp_path / "none.pth", "there is no file")
    save_file(original(16).state_dict(), tmp_path / "taef1.safetensors")
    refused(tmp_path / "taef1.safetensors", r"another latent space .* layers.0.weight has the shape \[64, 16, 3, 3\]")
    half = {name: tensor for name, tensor in original().state_dict().items() if not name.startswith("9.")}
    save_file(half, tmp_path / "half.safetensors")
    refused(tmp_path / "half.safetensors", "is not a whole TAESD decoder: it lacks layers.8")
    save_file({"emb_params": torch.zeros(2, 768)}, tmp_path / "word.safetensors")
    refused(tmp_path / "word.safetensors", '"word.safetensors" is a textual inversion embedding; a TAESD decoder is')
    tiny_sd15().vae.save_pretrained(tmp_path / "vae")
    refused(tmp_path / "vae", "holds AutoencoderKL, not a TAESD")
    refused(write_vae(tmp_path / "vae.safetensors", tiny_sd15()), "is not a whole TAESD decoder: it lacks layers.0")


def test_what_is_not_finite_is_an_error(tmp_path: Path) -> None:
    save_file(original().state_dict(), tmp_path / "taesd_decoder.safetensors")
    decoder = load_taesd(tmp_path / "taesd_decoder.safetensors", CPU, torch.float32)
    with pytest.raises(SpoError, match="TAESD decoder gives values that are not finite"):
        decoder.decode(torch.full((1, 4, 4, 4), float("nan")))
