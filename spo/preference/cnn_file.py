"""Files of the small networks, the latent CNN and the pixel CNN: weights in float16, kind and width in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from spo.checkpoint.tensor_file import TensorFile, read_tensors
from spo.errors import SpoError
from spo.files import write_whole
from spo.preference.latent_cnn import LatentCNN
from spo.preference.pixel_cnn import PixelCNN
from spo.preference.placement import Placement

CNN = TypeVar("CNN", LatentCNN, PixelCNN)
_KEY = "spo_preference"  # of the metadata


def is_cnn(network: type[LatentCNN] | type[PixelCNN], file: TensorFile) -> bool:
    """Whether `save_cnn` wrote the file, and of such a network."""
    return file.metadata.get(_KEY) == network.KIND


def save_cnn(network: LatentCNN | PixelCNN, path: Path, facts: Mapping[str, str]) -> None:
    """Write the network (float16) with `facts` as metadata, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    metadata = {_KEY: network.KIND, "width": str(network.width), **facts}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_cnn(network: type[CNN], file: TensorFile, name: str, place: Placement) -> CNN:
    """The frozen network in a file that `save_cnn` wrote, in float32. SpoError when it is damaged."""
    try:
        cnn = network(int(file.metadata["width"]), name)
        cnn.load_state_dict({key: value.float() for key, value in read_tensors(file, file.tensors).items()})
    except (KeyError, ValueError, RuntimeError) as error:
        first, kind = str(error).splitlines()[0], network.KIND.replace("_cnn", " CNN")
        raise SpoError(f'"{file.path.name}" is a damaged {kind} ({first}); fetch or fit it again.') from error
    return cnn.to(place.device).eval().requires_grad_(False)
