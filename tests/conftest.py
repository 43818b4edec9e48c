"""Shared by all tests: where the golden recordings lie, one thread, no network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_files import write_tiny_files

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["SPO_CACHE_DIR"] = tempfile.mkdtemp(prefix="spo_tests_")  # hashes are not remembered in the user's
torch.set_num_threads(1)  # sums do not depend on how many threads share them; and workers do not share cores
GOLDEN = Path(os.environ.get("SPO_GOLDEN_DIR") or Path(__file__).parent / "golden")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """`golden("loss")` -> tensors of that recording of the published implementation."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `write_tiny_files`, for reading only."""
    return write_tiny_files(tmp_path_factory.mktemp("files"))


def half_works() -> bool:
    """Whether this PyTorch computes in float16 on the CPU (2.1.2, the WebUI's, does not)."""
    try:
        torch.ones(1, 1, dtype=torch.float16) @ torch.ones(1, 1, dtype=torch.float16)
    except RuntimeError:
        return False
    return True


float16 = pytest.param(
    torch.float16, marks=pytest.mark.skipif(not half_works(), reason="this PyTorch has no float16 on the CPU")
)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; NaN when either is not finite."""
    value, expected = value.detach().double(), expected.detach().double()
    assert value.shape == expected.shape
    if not bool(torch.isfinite(value).all()):
        return float("nan")
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
