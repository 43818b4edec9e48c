"""The sha256 by which the WebUI knows a checkpoint; computed once for each file as it is."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from spo.errors import SpoError
from spo.files import write_text

_ENTRIES = 200  # of the cache; the oldest goes


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
    """The 10 hex digits by which the WebUI names a checkpoint (`Model hash` in infotext).

    SDXL takes half a minute to read from a disk, so the hash is remembered by path, size and time of change, in
    `hashes.json` of the cache folder; where that cannot be written, it is computed each time.
    """
    try:
        facts = Path(path).stat()
    except OSError as error:
        raise SpoError(f'"{path}" cannot be read: {error.strerror or error}') from error
    name, state = str(Path(path).absolute()), [facts.st_size, facts.st_mtime_ns]
    cache = cache_folder() / "hashes.json"
    entries = _read_cache(cache)
    entry = entries.pop(name, None)
    if isinstance(entry, list) and entry[:2] == state:
        return str(entry[2])[:10]
    sha256 = file_sha256(path)
    entries = dict([*entries.items(), (name, [*state, sha256])][-_ENTRIES:])
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_text(cache, json.dumps(entries))
    return sha256[:10]


def cache_folder() -> Path:
    """Where the system wants what can be made again; SPO_CACHE_DIR names another place."""
    if own := os.environ.get("SPO_CACHE_DIR"):
        return Path(own)
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "spo" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "spo"
    return Path(os.environ.get("XDG_CACHE_HOME", home / ".cache")) / "spo"


def _read_cache(path: Path) -> dict[str, object]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: everything is computed anew
        return {}
    return entries if isinstance(entries, dict) else {}
