"""Tiny checkpoints for the tests of this folder, which reach for no network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from spo.headless.model import DiffusersModel
from tests.headless_models import load
from tests.tiny_checkpoints import (
    write_tiny_sd15,
    write_tiny_sdxl,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a test tried to reach the network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def sd15_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd15(tmp_path_factory.mktemp("a") / "tiny.safetensors")


@pytest.fixture(scope="module")
def sdxl_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("b") / "tiny-xl.safetensors")


@pytest.fixture(scope="module")
def sd15(sd15_path: Path) -> DiffusersModel:
    return load(sd15_path)


@pytest.fixture(scope="module")
def sdxl(sdxl_path: Path) -> DiffusersModel:
    return load(sdxl_path)


@pytest.fixture(autouse=True)
def pickles_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch there is: they are made here. test_convert.py tests the refusal."""
    monkeypatch.setattr("spo.checkpoint.tensor_file.FIRST_SAFE_TORCH", (2, 0))
