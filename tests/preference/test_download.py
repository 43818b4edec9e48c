"""Fetching from a server on this machine that redirects as the hub does, and that breaks off."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download

from spo.errors import SpoError
from spo.preference.download import download, find_published, find_remote
from spo.preference.official import OFFICIAL_FILES, OfficialFile

CONTENT = bytes(range(256)) * 20_000  # 5 MB
BLOCK_BYTES = 1 << 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """`/.../resolve/main/NAME` redirects to `/cdn`; the server's attributes say how it fails."""

    def do_HEAD(self):
        if "missing" in self.path:
            self.send_error(404)
            return
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn")  # another host than the hub's
        self.send_header("X-Repo-Commit", "0" * 40)
        if self.server.tells_hash:
            self.send_header("X-Linked-Etag", f'"{SHA256}"')
            self.send_header("X-Linked-Size", str(len(CONTENT)))
        self.end_headers()

    def do_GET(self):
        if self.path != "/cdn":
            self.do_HEAD()
            return
        start = 0
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if asked and self.server.knows_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        count = self.server.breaks_after.pop(0) if self.server.breaks_after else len(CONTENT)
        self.wfile.write(self.server.content[start : start + count])

    def handle(self):
        with suppress(ConnectionError):  # the client goes away when it is stopped
            super().handle()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    official = {"sd15": OfficialFile("sd-v1-5_step-aware_preference_model.bin", SHA256)}
    monkeypatch.setattr("spo.preference.download.OFFICIAL_FILES", official)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for module in (file_download, constants):  # where the versions of the library look for it
        monkeypatch.setattr(module, "DOWNLOAD_CHUNK_SIZE", BLOCK_BYTES, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's own tries
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.breaks_after, server.asked, server.content = [], [], CONTENT
    server.knows_ranges = server.tells_hash = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def published(hub, tmp_path):
    return find_published("sd15", folder=tmp_path, hub=hub.url)


def test_size_and_hash_come_first(hub, tmp_path):
    remote = published(hub, tmp_path)
    assert (remote.size_bytes, remote.sha256) == (len(CONTENT), SHA256)
    assert remote.text().startswith("sd-v1-5_step-aware_preference_model.bin (5.12 MB) from http")
    assert hub.asked == [] and list(tmp_path.iterdir()) == []


def test_fetches_whole_with_progress(hub, tmp_path):
    seen = []
    path = download(published(hub, tmp_path), tmp_path / "new", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen) and len(seen) > 3
    assert list(path.parent.iterdir()) == [path]
    assert download(published(hub, tmp_path), path.parent) == path and len(hub.asked) == 1


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_goes_on_where_it_broke_off(hub, tmp_path, knows_ranges):
    hub.knows_ranges = knows_ranges
    hub.breaks_after = [2 * BLOCK_BYTES + 1, 2 * BLOCK_BYTES]
    path = download(published(hub, tmp_path), tmp_path)
    assert path.read_bytes() == CONTENT
    begins = [int((asked or "bytes=0-").removeprefix("bytes=").removesuffix("-")) for asked in hub.asked]
    assert begins[0] == 0 and begins[1] >= 2 * BLOCK_BYTES and len(begins) in (3, 4)  # 4: hub 0.23 without ranges
    if knows_ranges:
        assert begins[2] == begins[1] + 2 * BLOCK_BYTES


def test_a_later_call_goes_on(hub, tmp_path):
    remote = published(hub, tmp_path)
    with pytest.raises(SpoError, match=r"stopped after 1\.05 MB of sd-v1-5.*fetch it again to go on"):
        download(remote, tmp_path, should_stop=lambda: True)
    (part,) = tmp_path.iterdir()
    assert part.stat().st_size == BLOCK_BYTES
    hub.breaks_after = [0] * 50
    with pytest.raises(SpoError, match=r"The connection broke after 1\.05 MB of 5\.12 MB"):
        download(remote, tmp_path)
    hub.breaks_after = []
    path = download(remote, tmp_path)
    assert path.read_bytes() == CONTENT and hub.asked[-1] == f"bytes={BLOCK_BYTES}-"


def test_a_full_disk_is_told_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    remote = published(hub, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(SpoError, match=r"has 1 kB free; 5\.12 MB more are needed for sd-v1-5"):
        download(remote, tmp_path)
    assert hub.asked == []


def test_a_file_that_is_not_the_published_one_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("spo.preference.download.OFFICIAL_FILES", OFFICIAL_FILES)
    with pytest.raises(SpoError, match=r"is not the file that was published: its SHA-256 is .*, not 02b7c39c"):
        published(hub, tmp_path)


def test_a_wrong_hash_is_deleted(hub, tmp_path):
    hub.content = b"x" + CONTENT[1:]
    with pytest.raises(SpoError, match="arrived damaged"):
        download(published(hub, tmp_path), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_is_not_replaced(hub, tmp_path):
    remote = published(hub, tmp_path)
    (tmp_path / remote.name).write_text("mine")
    with pytest.raises(SpoError, match="exists already"):
        download(remote, tmp_path)
    assert (tmp_path / remote.name).read_text() == "mine"


def test_offline_says_where_to_put_the_file(hub, tmp_path):
    remote = published(hub, tmp_path)
    hub.shutdown()
    hub.server_close()
    for attempt in (lambda: published(hub, tmp_path), lambda: download(remote, tmp_path)):
        with pytest.raises(SpoError, match=r"127\.0\.0\.1 cannot be reached .*: fetch http.* elsewhere") as caught:
            attempt()
        assert f'put it at "{tmp_path / remote.name}"' in str(caught.value)


def test_what_cannot_be_checked_or_found(hub, tmp_path):
    with pytest.raises(SpoError, match="answers 404"):
        find_remote("a/b", "missing.bin", folder=tmp_path, hub=hub.url)
    hub.tells_hash = False
    with pytest.raises(SpoError, match="tells no size and SHA-256"):
        published(hub, tmp_path)
    with pytest.raises(SpoError, match='published for "sd3"; accepted are sd15'):
        find_published("sd3", folder=tmp_path, hub=hub.url)
