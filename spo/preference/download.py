"""Fetch a published preference model from Hugging Face: size first, resumed when broken off, checked by hash.

Standard library only. The hub answers `HEAD .../resolve/main/NAME` with a redirect whose headers X-Linked-Size and
X-Linked-Etag are the size and the SHA-256 of a large file.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo import __version__
from spo.errors import SpoError
from spo.files import exists_already, size_text
from spo.preference.load import OFFICIAL_FILES, OFFICIAL_REPOSITORY

HUB = "https://huggingface.co"
_BLOCK_BYTES = 1 << 20
_TRIES = 5  # in a row without a single new byte
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub. sha256: 64 hexadecimal digits."""

    name: str
    url: str
    size_bytes: int
    sha256: str

    def text(self) -> str:
        """Name and size, to be shown before it is fetched."""
        return f"{self.name} ({size_text(self.size_bytes)}) from {self.url}"


def find_published(architecture: str, *, folder: Path, hub: str = HUB) -> RemoteFile:
    """The published step-aware model for "sd15" or "sdxl": asks the hub for size and hash, fetches nothing.

    folder  where it shall go, for the sentence that an offline user gets
    """
    if architecture not in OFFICIAL_FILES:
        known = " and ".join(OFFICIAL_FILES)
        raise SpoError(f'no preference model was published for "{architecture}"; accepted are {known}.')
    return find_remote(OFFICIAL_REPOSITORY, OFFICIAL_FILES[architecture], folder=folder, hub=hub)


def find_remote(repository: str, name: str, *, folder: Path, hub: str = HUB) -> RemoteFile:
    """Size and hash of a large file of a repository on the hub; fetches nothing. See `find_published`.

    Raises SpoError when the hub cannot be reached, has no such file, or tells no hash.
    """
    url = f"{hub}/{repository}/resolve/main/{urllib.parse.quote(name)}"
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(_request(url, method="HEAD"), timeout=_TIMEOUT_S) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        if error.code not in (301, 302, 303, 307, 308):
            raise _unreachable(error, url, folder / name) from error
        headers = error.headers
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(error, url, folder / name) from error
    sha256 = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").strip('W/"').lower()
    size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    if not re.fullmatch("[0-9a-f]{64}", sha256) or not size.isdigit():
        raise SpoError(f'"{url}" tells no size and SHA-256, so what comes could not be checked.')
    return RemoteFile(Path(name).name, url, int(size), sha256)


def download(
    remote: RemoteFile,
    folder: Path,
    *,
    progress: Callable[[int, int], object] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Fetch `remote` into `folder`; the file gets its name only when it is whole and its hash is right.

    What came so far lies in a hidden .part file; the next call goes on there, and so does this one when the connection
    breaks. A file of that name with the right hash is not fetched again.

    progress     called with bytes done and in all, after each block
    should_stop  asked after each block; True ends with SpoError, to be gone on with later

    Raises SpoError for another file of that name, a full disk, a broken connection (five tries without a new byte), a
    wrong hash (what came is then deleted).
    """
    target = folder / remote.name
    if target.exists():
        if target.stat().st_size == remote.size_bytes and _sha256(target) == remote.sha256:
            return target
        raise exists_already(target)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{remote.name}.{remote.sha256[:12]}.part"
    if part.exists() and part.stat().st_size > remote.size_bytes:
        part.unlink()
    done = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(folder).free
    if free < remote.size_bytes - done:
        needed = size_text(remote.size_bytes - done)
        raise SpoError(f'"{folder}" has {size_text(free)} free; {needed} more are needed for {remote.name}.')
    _fetch(remote, part, target, progress, should_stop)
    if _sha256(part) != remote.sha256:
        part.unlink()
        raise SpoError(f"{remote.name} arrived damaged (its SHA-256 is wrong) and was deleted; fetch it again.")
    os.replace(part, target)
    return target


def _fetch(
    remote: RemoteFile,
    part: Path,
    target: Path,
    progress: Callable[[int, int], object],
    should_stop: Callable[[], bool],
) -> None:
    """Append to `part` until it has its size, asking again where the connection broke."""
    tries = 0
    while (done := part.stat().st_size if part.exists() else 0) < remote.size_bytes:
        try:
            _fetch_once(remote, part, done, progress, should_stop)
        except urllib.error.HTTPError as error:
            raise _unreachable(error, remote.url, target) from error
        except (OSError, http.client.HTTPException) as error:
            reason: Exception | None = error
        else:
            reason = None  # the server ended early without an error
        came = part.stat().st_size if part.exists() else 0
        tries = 0 if came > done else tries + 1
        if came < remote.size_bytes and tries == _TRIES:
            if came == 0 and reason is not None:
                raise _unreachable(reason, remote.url, target) from reason
            raise SpoError(
                f"the connection broke after {size_text(came)} of {size_text(remote.size_bytes)} of {remote.name}; "
                "what came is kept, fetch it again to go on."
            ) from reason


def _fetch_once(
    remote: RemoteFile,
    part: Path,
    done: int,
    progress: Callable[[int, int], object],
    should_stop: Callable[[], bool],
) -> None:
    with urllib.request.urlopen(_request(remote.url, f"bytes={done}-"), timeout=_TIMEOUT_S) as answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        done = done if goes_on else 0  # a server that knows no ranges starts from the beginning
        with part.open("ab" if goes_on else "wb") as file:
            while done < remote.size_bytes and (block := answer.read(min(_BLOCK_BYTES, remote.size_bytes - done))):
                file.write(block)
                done += len(block)
                progress(done, remote.size_bytes)
                if should_stop():
                    raise SpoError(f"stopped after {size_text(done)} of {remote.name}; fetch it again to go on.")
            file.flush()
            os.fsync(file.fileno())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """The redirect's own headers are wanted."""
        return None


def _request(url: str, byte_range: str | None = None, method: str = "GET") -> urllib.request.Request:
    headers = {"User-Agent": f"sd-webui-spo/{__version__}", "Accept-Encoding": "identity"}
    return urllib.request.Request(url, headers=headers | ({"Range": byte_range} if byte_range else {}), method=method)


def _unreachable(error: Exception, url: str, target: Path) -> SpoError:
    host = urllib.parse.urlsplit(url).hostname
    if isinstance(error, urllib.error.HTTPError) and error.code < 500:
        why = f"{host} answers {error.code} {error.reason}"
    else:
        why = f"{host} cannot be reached ({getattr(error, 'reason', None) or error})"
    return SpoError(f'{why}: fetch {url} elsewhere and put it at "{target.absolute()}".')


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
