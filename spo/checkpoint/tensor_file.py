"""The tensors of a file: names, shapes and dtypes first, the tensors themselves when asked for.

Of a .safetensors file only the header is read; of a pickle (.ckpt, .pt, .bin) the tensor index, through torch's
weights-only loader, which is to run no code. Two advisories got around it, CVE-2025-32434, mended in torch 2.6, and
CVE-2026-24747, mended in 2.10: with an older torch, such as the WebUI's 2.1, pickles are refused unless the caller
trusts them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from spo.errors import SpoError

if TYPE_CHECKING:
    from torch import Tensor

FIRST_SAFE_TORCH = (2, 10)
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library's own


def refuse(path: Path, sentence: str) -> NoReturn:
    """Raise SpoError: the file's name and what is wrong with it."""
    raise SpoError(f'"{path.name or path}" {sentence}')


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its shape, and its dtype by safetensors' name (F32, F16, BF16, ...)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TensorFile:
    """The index of a file: what tensors it holds. `read_tensors` reads them.

    tensors   name -> entry; of a pickle, the tensors of its `state_dict` or of its top level
    metadata  safetensors' string metadata; empty for a pickle
    """

    path: Path
    is_pickle: bool
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size_bytes: int


def open_tensor_file(path: Path | str, *, trusted: bool = False) -> TensorFile:
    """The index of a .safetensors or pickle (.ckpt, .pt, .bin) file; which it is tells its content, not its name.

    trusted  read a pickle with any torch: its content is known otherwise, by its hash

    Raises SpoError for what is missing, unreadable, truncated, not such a file, a pickle holding other things, and a
    pickle that this torch cannot read safely.
    """
    path = Path(path)
    if not path.exists():
        raise SpoError(f'there is no file "{path}"')
    if not path.is_file():
        refuse(path, "is not a file")
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
        size_bytes = path.stat().st_size
    except OSError as error:
        raise SpoError(f'"{path}" cannot be read: {error.strerror or error}') from error
    if is_pickle(start):
        if not trusted and not reads_pickles_safely():
            import torch

            refuse(
                path,
                f"is a pickle, and PyTorch {torch.__version__} can be made to run code by one (CVE-2025-32434, "
                "CVE-2026-24747; mended in 2.10): take the same file as .safetensors, or convert it by "
                f'`python run.py convert "{path}"`',
            )
        entries = {name: _entry(tensor) for name, tensor in _load_pickle(path).items()}
        return TensorFile(path, True, entries, {}, size_bytes)
    _refuse_foreign(path, start, size_bytes)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as opened:  # numpy: the index alone needs no torch
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            entries = {name: TensorEntry(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            return TensorFile(path, False, entries, opened.metadata() or {}, size_bytes)
    except (SafetensorError, OSError) as error:
        raise SpoError(f'"{path.name}" {_what_is_wrong(path, size_bytes)}') from error


def reads_pickles_safely() -> bool:
    """Whether this torch's weights-only loader is without known holes."""
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= FIRST_SAFE_TORCH


def read_tensors(file: TensorFile, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors on the CPU, in the file's own dtypes; other tensors are not read."""
    if file.is_pickle:
        tensors = _load_pickle(file.path)
        return {name: tensors[name] for name in names}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file.path), framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise SpoError(f'"{file.path}" cannot be read: {error}') from error


def is_pickle(start: bytes) -> bool:
    """Whether a file that starts so is a torch checkpoint, zipped or not. A safetensors header's length may look so."""
    return (start[:2] == b"PK" or start[:1] == b"\x80") and start[8:9] != b"{"


def _refuse_foreign(path: Path, start: bytes, size_bytes: int) -> None:
    """Raise SpoError for what is known by its first 64 bytes, in better words than the safetensors library has."""
    text = start.lstrip()[:16].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        refuse(path, "is a web page, not a checkpoint: the download went wrong")
    if start.startswith(b"version https://git-lfs"):
        refuse(path, "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    if start[:4] == b"GGUF":
        refuse(path, "is a GGUF file (quantized); a .safetensors or .ckpt checkpoint is needed")
    if _is_text(start):
        refuse(path, "is a text file; a safetensors file or a torch checkpoint is needed")
    if size_bytes < 8:
        refuse(path, f"is truncated: it has only {size_bytes} bytes")
    if int.from_bytes(start[:8], "little") > _HEADER_LIMIT_BYTES or start[8:9] not in (b"{", b""):
        refuse(path, "is neither a safetensors file nor a torch checkpoint")


def _what_is_wrong(path: Path, size_bytes: int) -> str:
    """Why the library refuses a file that begins like one of its own: how many bytes there should be, and are."""
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = stream.read(header_bytes)
    if len(header) < header_bytes:
        return f"is truncated: its header alone has {8 + header_bytes} bytes, the file {size_bytes}"
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected_bytes = 8 + header_bytes + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "is not a safetensors file: its header does not list tensors"
    if expected_bytes == size_bytes:
        return "is damaged: its header contradicts itself"
    state = "truncated" if expected_bytes > size_bytes else "damaged"
    return f"is {state}: its header lists {expected_bytes} bytes, the file has {size_bytes}"


def _is_text(start: bytes) -> bool:
    """Whether the first 64 bytes are printable; a safetensors file's length, in the first 8, never is."""
    text = start.decode("utf-8", errors="ignore").replace("\n", " ").replace("\r", " ").replace("\t", " ")
    return len(start) > 3 and text.isprintable() and len(text.encode()) >= len(start.lstrip(b"\xef\xbb\xbf")) - 3


def _load_pickle(path: Path) -> dict[str, Tensor]:
    import torch

    if path.suffix == ".safetensors":
        refuse(path, "is a torch checkpoint under a wrong name: rename it to .ckpt")
    with path.open("rb") as stream:
        is_zip = stream.read(2) == b"PK"
    # not torch.load: the WebUI puts its own there, which answers None for what it does not know
    try:  # mmap: only the tensors that are used are read
        content = torch.serialization.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise SpoError(
            f'"{path.name}" is a pickle that holds more than tensors, and loading it could run any code: '
            "convert it to .safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise SpoError(f'"{path.name}" is truncated, damaged, or not a torch checkpoint') from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {}
    if isinstance(content, dict):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if isinstance(content, dict) and "string_to_param" in content:
        refuse(path, "is a textual inversion embedding, not a checkpoint")
    if not tensors:
        refuse(path, "is a pickle without named tensors, not a checkpoint")
    return tensors


def _entry(tensor: Tensor) -> TensorEntry:
    name = str(tensor.dtype).removeprefix("torch.")
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32"}
    return TensorEntry(tuple(tensor.shape), short.get(name, name))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; SpoError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpoError(f'"{path}" is not a readable JSON file') from error
    if not isinstance(content, dict):
        raise SpoError(f'"{path}" does not hold a JSON object')
    return content
