"""A file of tensors, a pickle for instance, written as .safetensors, which every torch may read."""

from __future__ import annotations

import shutil
from pathlib import Path

from spo.checkpoint.tensor_file import open_tensor_file, read_tensors
from spo.errors import SpoError
from spo.files import exists_already, size_text, write_whole


def convert(source: Path, target: Path, *, replace: bool = False) -> None:
    """Write the tensors of a file to a new .safetensors file, as they are, whole or not at all.

    Of a checkpoint with a `state_dict` that is what is written; an optimizer or callbacks beside it are not. Tensors
    that share memory are written once each.

    Raises SpoError for what is no readable file of tensors, and for a target that exists unless `replace`.
    """
    from safetensors.torch import save_file

    if target.suffix != ".safetensors":
        raise SpoError(f'output is "{target}"; accepted is a name that ends in .safetensors.')
    if target.exists() and not replace:
        raise exists_already(target)
    file = open_tensor_file(source)
    free = shutil.disk_usage(target.absolute().parent).free
    if free < file.size_bytes:
        raise SpoError(f'"{target.absolute().parent}" has {size_text(free)} free; too little for "{target.name}".')
    tensors = {name: tensor.contiguous() for name, tensor in read_tensors(file, file.tensors).items()}
    starts: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses what shares memory
        start = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if start in starts else tensor
        starts.add(start)
    metadata = {"format": "pt", **file.metadata}
    write_whole(target, lambda temporary: save_file(tensors, str(temporary), metadata))
