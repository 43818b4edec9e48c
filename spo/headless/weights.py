"""Weights from files into networks: in portions, converted by name, copied straight to their device and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spo.checkpoint.tensor_file import TensorFile, read_tensors
from spo.errors import SpoError

PORTION_BYTES = 2**29  # of a file that is mapped at a time
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8}

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # tensors by the file's names -> by the network's names


@dataclass(frozen=True)
class Source:
    """Where a network's weights come from.

    files    several when sharded
    prefix   of the names that belong to the network
    convert  tensors by the files' names -> the same by the network's, whatever part of them is real and what meta
    """

    files: Sequence[TensorFile]
    prefix: str | tuple[str, ...]
    convert: Convert

    def names(self, file: TensorFile) -> list[str]:
        """Those of the file that belong to the network."""
        return [name for name in file.tensors if name.startswith(self.prefix)]

    def _meta(self) -> dict[str, Tensor]:
        return {
            name: torch.empty(file.tensors[name].shape, device="meta")
            for file in self.files
            for name in self.names(file)
        }

    def converted(self) -> dict[str, Tensor]:
        """The network's names and shapes, on the meta device."""
        return self.convert(self._meta())

    def check(self, network: Any, what: str) -> None:
        """SpoError unless every weight is there in its shape."""
        wanted, tensors = _weights(network), self.converted()
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise SpoError(f"The {what} is incomplete: {len(missing)} tensors are missing, such as {missing[0]}")
        for name, tensor in wanted.items():
            if tensor.shape != tensors[name].shape:
                raise SpoError(
                    f"The {what} does not fit: {name} has the shape {list(tensors[name].shape)} where "
                    f"{list(tensor.shape)} is expected"
                )

    def fill(
        self,
        network: Any,
        device: torch.device,
        dtype: torch.dtype,
        *,
        only: tuple[str, ...] = ("",),
        in_float8: Collection[str] = (),
    ) -> None:
        """Give the network its weights: copies on `device` in `dtype`, of those whose names begin as `only` says.

        A portion of a file is mapped, converted together with meta tensors for all else, and let go of.
        """
        wanted, meta, modules = _weights(network), self._meta(), dict(network.named_modules())
        channels_last = device.type == "cuda" and dtype != torch.float32
        for file in self.files:
            for portion in _portions(file, self.names(file)):
                converted = self.convert({**meta, **read_tensors(file, portion)})
                state = {
                    name: _stored(tensor, device, dtype, name in in_float8, channels_last)
                    for name, tensor in converted.items()
                    if name in wanted and name.startswith(only) and (not tensor.is_meta or device.type == "meta")
                }
                for name, tensor in state.items():  # `load_state_dict` goes through all modules for each portion
                    path, _, leaf = name.rpartition(".")
                    module = modules[path]
                    if leaf in module._parameters:
                        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
                    else:
                        module._buffers[leaf] = tensor


def _stored(tensor: Tensor, device: torch.device, dtype: torch.dtype, in_float8: bool, channels_last: bool) -> Tensor:
    """A copy that shares nothing with the mapped file."""
    layout = torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format
    moved = tensor.to(device=device, dtype=dtype, copy=True, memory_format=layout)
    if not in_float8:
        return moved
    limit = torch.finfo(torch.float8_e4m3fn).max
    return moved.clamp(-limit, limit).to(torch.float8_e4m3fn)


def _portions(file: TensorFile, names: Sequence[str]) -> Iterator[list[str]]:
    """The names in parts of about `PORTION_BYTES`."""
    portion: list[str] = []
    size_bytes = 0
    for name in names:
        entry = file.tensors[name]
        portion.append(name)
        size_bytes += math.prod(entry.shape) * _BYTES.get(entry.dtype, 4)
        if size_bytes >= PORTION_BYTES:
            yield portion
            portion, size_bytes = [], 0
    if portion:
        yield portion


def _weights(network: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("position_ids")}


def ready(network: Any, device: torch.device) -> Any:
    """Frozen, in eval mode, its counts of positions in place: no weights, so in no checkpoint."""
    for module in network.modules():
        if isinstance(getattr(module, "position_ids", None), Tensor):
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return network.requires_grad_(False).eval()
