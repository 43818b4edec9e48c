"""What a file holds, and what is no tensor file at all."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from spo.checkpoint.inspect import inspect_checkpoint
from spo.checkpoint.tensor_file import open_tensor_file, read_tensors
from tests.crafted_files import ONE, UNET, refused, shapes_of, with_header
from tests.tiny_checkpoints import (
    write_tiny_sd15,
)


def test_pickle_equals_safetensors(tmp_path: Path, sd15: Path) -> None:
    path = write_tiny_sd15(tmp_path / "tiny.ckpt")
    expected = inspect_checkpoint(sd15)
    info = inspect_checkpoint(path)
    same = dataclasses.replace(expected, path=path, size_bytes=info.size_bytes)
    assert info == same
    name = f"{UNET}out.2.weight"
    (tensor,) = read_tensors(open_tensor_file(path), [name]).values()
    assert torch.equal(tensor, read_tensors(open_tensor_file(sd15), [name])[name])


def test_old_pickle_format_and_name_without_ending(tmp_path: Path) -> None:
    names = shapes_of(write_tiny_sd15(tmp_path / "a.safetensors"))
    tensors = {name: torch.zeros(shape) for name, shape in names.items() if "token_embedding" not in name}
    torch.save(tensors, str(tmp_path / "old"), _use_new_zipfile_serialization=False)
    assert inspect_checkpoint(tmp_path / "old").text_encoders == ()


def test_missing_file_and_special_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "there is no file")
    refused(Path("/dev/null"), "is not a file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: it has only 0 bytes"),
        (b"abc", "truncated: it has only 3 bytes"),
        (with_header(ONE, b"1234567"), "truncated: its header lists 70 bytes, the file has 69"),
        (with_header(ONE)[:-20], "truncated: its header alone has 62 bytes, the file 42"),
        (with_header(ONE, b"123456789"), "damaged"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "is a web page"),
        (b"\n\n <html lang=en>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
        (b"just some text that is long enough", "is a text file"),
        (with_header(b"{not json}"), "not a safetensors file"),
        (with_header(b'{"a":3}'), "not a safetensors file"),
        (with_header(b'{"a":{"dtype":"F32"}}'), "not a safetensors file"),
        (b"PK\x03\x04" + bytes(100), "a torch checkpoint under a wrong name: rename it to .ckpt"),
        (b"\x80\x02" + bytes(100), "rename it to .ckpt"),
    ],
)
def test_not_a_tensor_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refused(path, message)


class NotATensor:
    """Stands for the callbacks that old checkpoints carry."""


def test_pickles_with_other_things(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": NotATensor()}, str(tmp_path / "callbacks.ckpt"))
    refused(tmp_path / "callbacks.ckpt", "holds more than tensors.*convert it to .safetensors")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"a": NotATensor()}))
    refused(tmp_path / "plain.ckpt", "pickle|torch checkpoint")
    torch.save({"epoch": 3, "names": ["a"]}, str(tmp_path / "empty.pt"))
    refused(tmp_path / "empty.pt", "without named tensors")
    torch.save([torch.zeros(1)], str(tmp_path / "list.pt"))
    refused(tmp_path / "list.pt", "without named tensors")
    torch.save({"string_to_param": {"*": torch.zeros(1, 768)}, "name": "x"}, str(tmp_path / "word.pt"))
    refused(tmp_path / "word.pt", "textual inversion")
    whole = write_tiny_sd15(tmp_path / "whole.ckpt")
    half = whole.read_bytes()[: whole.stat().st_size // 2]
    for content in (half, b"PK\x03\x04" + bytes(99), b"\x80\x02" + bytes(99)):
        (tmp_path / "half.ckpt").write_bytes(content)
        refused(tmp_path / "half.ckpt", "truncated, damaged|pickle that holds more")
