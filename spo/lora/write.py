"""A LoRA file is written: kohya's names and metadata, which the WebUI, ComfyUI and diffusers all read.

A file holds, for each module, `<name>.lora_down.weight`, `<name>.lora_up.weight` and `<name>.alpha`, and nothing else.
A module's weight changes by `alpha / rank * up @ down`.

Deliberate differences from kohya's files: `alpha` is always float32 (half precision would round it), and
`ss_sd_model_hash` is the WebUI's short sha256 of the checkpoint, not the older hash of a piece of it.

Written by hand, although diffusers has `convert_state_dict_to_kohya`: that one sets every alpha to the rank, whatever
it was, knows one prefix for text encoders only, and mangles names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spo.checkpoint.tensor_file import open_tensor_file, read_tensors
from spo.errors import SpoError
from spo.files import exists_already, named_when_whole
from spo.lora.layer import LoraLayer, checked_layer
from spo.lora.module_names import FILE_PREFIX

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def write_lora(
    path: Path | str,
    layers: Mapping[str, LoraLayer],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float16,
    replace: bool = False,
    allow_zero: bool = False,
) -> None:
    """Write a LoRA file whole, read it back, and only then give it its name; a failure leaves nothing behind.

    path        NAME.safetensors in an existing folder; NAME is what `ss_output_name`, if there, has to say
    layers      by file name, `lora_unet_...` (`module_names.file_name`)
    metadata    of `lora_metadata`; the hashes `sshs_model_hash` and `sshs_legacy_hash` are added
    dtype       of the weights: float16, bfloat16 or float32; alpha is float32
    replace     an existing file may be replaced, in one step
    allow_zero  also write a LoRA that changes nothing

    Raises SpoError when the file exists and `replace` is off, when a weight is not finite or becomes infinite in
    `dtype`, when no layer changes anything, when shapes do not fit, when the disk refuses, and when the file read back
    is not what was written.
    """
    path = Path(path)
    _check_target(path, metadata, replace)
    tensors = _file_tensors(path, layers, dtype)
    if not allow_zero and not any(_changes_something(tensors, name) for name in layers):
        raise SpoError(f'"{path.name}" is not written: the LoRA would do nothing, every layer of it is zero.')
    metadata = {**metadata, **_hashes(tensors, metadata)}
    content = _serialize(tensors, metadata)
    try:
        with named_when_whole(path, replace=replace) as temporary:
            temporary.write_bytes(content)
            _verify(path, temporary, tensors, metadata)
    except OSError as error:
        raise SpoError(f'"{path}" cannot be written: {error.strerror or error}.') from error


def _check_target(path: Path, metadata: Mapping[str, str], replace: bool) -> None:
    if path.suffix != ".safetensors":
        raise SpoError(f'"{path.name}" is not a name for a LoRA file; it has to end in .safetensors.')
    if not path.parent.is_dir():
        raise SpoError(f'There is no folder "{path.parent}" to write "{path.name}" into.')
    if path.exists() and not replace:
        raise exists_already(path)
    if metadata.get("ss_output_name", path.stem) != path.stem:
        raise SpoError(f'"{path.name}" would say that its name is "{metadata["ss_output_name"]}", not "{path.stem}".')


def _file_tensors(path: Path, layers: Mapping[str, LoraLayer], dtype: torch.dtype) -> dict[str, Tensor]:
    if dtype not in DTYPES:
        raise SpoError(f"A LoRA file cannot have the dtype {dtype}; choose from {', '.join(DTYPES.values())}.")
    if not layers:
        raise SpoError(f'"{path.name}" is not written: there are no LoRA layers.')
    tensors = {}
    for name, layer in layers.items():
        if not re.fullmatch(rf"{FILE_PREFIX}\w+", name):
            raise SpoError(f'"{name}" is not a name for a layer of a LoRA file; it has to look like {FILE_PREFIX}...')
        tensors[name + ALPHA] = torch.tensor(float(layer.alpha), dtype=torch.float32)
        layer = checked_layer(path, name, layer.down, layer.up, layer.alpha)
        for suffix, weight in ((DOWN, layer.down), (UP, layer.up)):
            tensors[name + suffix] = _cast(path, name + suffix, weight.detach().cpu(), dtype)
    return tensors


def _cast(path: Path, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.to(dtype, copy=True).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise SpoError(
            f'"{path.name}" cannot be saved in {DTYPES[dtype]}: "{name}" reaches {float(weight.abs().max()):.6g}, and '
            f"{DTYPES[dtype]} ends at {torch.finfo(dtype).max:.6g}; save in float32 or train with a lower rate."
        )
    return cast


def _changes_something(tensors: Mapping[str, Tensor], name: str) -> bool:
    return all(bool(tensors[name + suffix].any()) for suffix in (UP, DOWN, ALPHA))


def _serialize(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    import safetensors.torch

    return safetensors.torch.save(tensors, dict(metadata))


def _hashes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's: sha256 of all behind the header; and 8 digits of a piece of a file that has only training facts."""
    content = _serialize(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    body = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def _verify(path: Path, temporary: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """SpoError unless the file at `temporary` holds exactly these tensors and this metadata."""
    try:
        file = open_tensor_file(temporary)
        copies = read_tensors(file, file.tensors)
    except SpoError as error:
        raise SpoError(f'"{path.name}" was not saved, what was written cannot be read back: {error}') from error
    wrong = [
        name
        for name in {**tensors, **copies}
        if name not in tensors
        or name not in copies
        or (copies[name].shape, copies[name].dtype) != (tensors[name].shape, tensors[name].dtype)
        or not torch.equal(copies[name], tensors[name])
    ]
    wrong += [key for key in {**metadata, **file.metadata} if metadata.get(key) != file.metadata.get(key)]
    if wrong:
        raise SpoError(f'"{path.name}" was not saved: read back, {len(wrong)} entries differ, the first "{wrong[0]}".')
