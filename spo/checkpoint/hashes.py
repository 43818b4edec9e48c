"""The sha256 by which the WebUI knows a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

from spo.errors import SpoError


def file_sha256(path: Path | str) -> str:
    """sha256 of the whole file, 64 hex digits, as the WebUI computes it for checkpoints."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SpoError(f'"{path}" cannot be read: {error.strerror or error}') from error
    return digest.hexdigest()


def short_hash(path: Path | str) -> str:
    """The 10 hex digits by which the WebUI names a checkpoint (`Model hash` in infotext)."""
    return file_sha256(path)[:10]
