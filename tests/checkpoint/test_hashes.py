"""The WebUI's hash of a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from spo.checkpoint.hashes import file_sha256, short_hash
from spo.errors import SpoError


def test_hash(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()
    assert short_hash(path) == hashlib.sha256(content).hexdigest()[:10]
    with pytest.raises(SpoError, match="cannot be read"):
        short_hash(tmp_path / "none")
