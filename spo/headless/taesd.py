"""TAESD: a decoder of 1.2 million weights in the VAE's place, for who has its file. Fast, small, a little less exact.

Its files are those of github.com/madebyollin/taesd (taesd_decoder for SD1.5, taesdxl_decoder for SDXL; .safetensors or
.pth), or a folder or file as diffusers saves its AutoencoderTiny. Which of the two latent spaces it is for, no tensor
tells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo.checkpoint.folder import open_folder_part
from spo.checkpoint.kinds import kind_of
from spo.checkpoint.tensor_file import TensorFile, open_tensor_file, read_tensors
from spo.errors import SpoError
from spo.headless.vae import is_finite, portions

_OURS = "decoder."  # what precedes the names in files of diffusers


class TinyDecoder:
    """A TAESD decoder, frozen, in eval mode. It reads the UNet's latents as they are, without a scale factor."""

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.network, self.device, self.dtype = network, device, dtype

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 4) -> Tensor:
        """[N, 4, h, w] latents of any float dtype -> [N, 3, 8 h, 8 w] pictures about [-1, 1], not clamped, float32.

        Raises SpoError for what is not finite.
        """
        parts = [self.network(part.to(self.device, self.dtype)).float() for part in portions(latents, 8, batch)]
        pictures = torch.cat(parts)
        if not is_finite(pictures):
            raise SpoError("The TAESD decoder gives values that are not finite; decode with the checkpoint's VAE.")
        return pictures

    def lessen(self) -> str | None:
        """It cannot take less memory."""
        return None

    def memory_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(t.numel() * t.element_size() for t in self.network.parameters())


def load_taesd(path: Path, device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """The decoder in a file or folder. Raises SpoError for anything else, and for one of another latent space."""
    from diffusers import AutoencoderTiny

    config: dict[str, Any] = {}
    if path.is_dir():
        part = open_folder_part(path)
        if part.config.get("_class_name") != "AutoencoderTiny":
            raise SpoError(f'"{path}" holds {part.config.get("_class_name")}, not a TAESD (AutoencoderTiny)')
        config = {name: value for name, value in part.config.items() if not name.startswith("_")}
        file = part.files[0]
    else:
        file = open_tensor_file(path)
    names = _names(file)
    with torch.device("meta"):
        decoder = AutoencoderTiny.from_config(config).decoder
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    for name, shape in shapes.items():
        entry = file.tensors.get(names.get(name, ""))
        if entry is None:
            raise SpoError(f'"{path.name}" is not a whole TAESD decoder: it lacks {name}')
        if entry.shape != shape:
            raise SpoError(
                f'"{path.name}" is a TAESD for another latent space or of another size: {name} has the shape '
                f"{list(entry.shape)}, not {list(shape)}"
            )
    tensors = read_tensors(file, [names[name] for name in shapes])
    state = {name: tensors[names[name]].to(device, dtype, copy=True) for name in shapes}
    decoder.load_state_dict(state, assign=True)
    return TinyDecoder(decoder.requires_grad_(False).eval(), device, dtype)


def _names(file: TensorFile) -> dict[str, str]:
    """Name in diffusers' decoder -> name in the file. The original's first layer, a clamp, is no layer in diffusers."""
    names = {}
    for name in file.tensors:
        number, _, rest = name.partition(".")
        if name.startswith(_OURS):
            names[name.removeprefix(_OURS)] = name
        elif number.isdigit():
            names[f"layers.{int(number) - 1}.{rest}"] = name
    if not names:
        raise SpoError(f'"{file.path.name}" is {kind_of(file).text}; a TAESD decoder is needed')
    return names
