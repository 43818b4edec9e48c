"""The WebUI's hash of a checkpoint."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from spo.checkpoint import hashes
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


def test_a_hash_is_computed_once_for_a_file_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_ENTRIES", 2)
    read: list[str] = []
    monkeypatch.setattr(hashes, "file_sha256", lambda path: read.append(Path(path).name) or file_sha256(path))
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
        assert short_hash(tmp_path / name) == short_hash(str(tmp_path / name)) == file_sha256(tmp_path / name)[:10]
    assert read == ["a", "b", "c"]
    os.utime(tmp_path / "c", (1, 1))  # changed in place: other bytes of the same length
    short_hash(tmp_path / "c")
    (tmp_path / "b").write_bytes(b"longer")
    assert short_hash(tmp_path / "b") == hashlib.sha256(b"longer").hexdigest()[:10]
    assert read == ["a", "b", "c", "c", "b"]
    short_hash(tmp_path / "a")  # only two are remembered
    assert read[5:] == ["a"]


def test_a_damaged_or_forbidden_cache_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")
    for content in ("{", "[]", '{"x": 3}'):
        monkeypatch.setenv("SPO_CACHE_DIR", str(tmp_path / "cache"))
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / "hashes.json").write_text(content)
        assert short_hash(tmp_path / "x") == hashlib.sha256(b"x").hexdigest()[:10]
    monkeypatch.setenv("SPO_CACHE_DIR", str(tmp_path / "x" / "no folder"))
    assert short_hash(tmp_path / "x") == hashlib.sha256(b"x").hexdigest()[:10]


@pytest.mark.parametrize("platform", ["win32", "darwin", "linux"])
def test_the_cache_is_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.delenv("SPO_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    monkeypatch.setenv("LOCALAPPDATA", "/x/local")
    monkeypatch.setattr(hashes.sys, "platform", platform)
    home = Path.home() / "Library" / "Caches" / "spo"
    places = {"win32": Path("/x/local/spo/cache"), "darwin": home, "linux": Path("/x/cache/spo")}
    assert hashes.cache_folder() == places[platform]
