"""Fetch a published preference model from Hugging Face: size first, resumed when broken off, checked by hash.

`huggingface_hub` (0.23.2 to 2.x) asks, follows redirects and mirrors, and streams. By hand is what it does not do: its
`hf_hub_download` cannot be stopped, reports to a progress bar alone before version 1, does not compare the SHA-256, and
only warns of a full disk; so the file object that its `http_get` writes to is ours.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spo import __version__
from spo.checkpoint.hashes import file_sha256
from spo.errors import SpoError
from spo.files import exists_already, size_text
from spo.preference.official import OFFICIAL_FILES, OFFICIAL_REPOSITORY

HUB = "https://huggingface.co"
_TRIES = 3  # in a row without a new byte; within each, the hub's library tries several times itself
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
    hub     address of the hub or of a mirror

    Raises SpoError as `find_remote`, and when the hub's file is not the one that was published.
    """
    if architecture not in OFFICIAL_FILES:
        known = " and ".join(OFFICIAL_FILES)
        raise SpoError(f'no preference model was published for "{architecture}"; accepted are {known}.')
    official = OFFICIAL_FILES[architecture]
    remote = find_remote(OFFICIAL_REPOSITORY, official.name, folder=folder, hub=hub)
    if remote.sha256 != official.sha256:
        raise SpoError(
            f"{remote.url} is not the file that was published: its SHA-256 is {remote.sha256}, not {official.sha256}; "
            "fetch nothing from there."
        )
    return remote


def find_remote(repository: str, name: str, *, folder: Path, hub: str = HUB) -> RemoteFile:
    """Size and hash of a large file of a repository on the hub; fetches nothing. See `find_published`.

    Raises SpoError when the hub cannot be reached, has no such file, or tells no hash.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository, name, endpoint=hub)
    try:
        metadata = get_hf_file_metadata(
            url, token=False, timeout=_TIMEOUT_S, library_name="sd-webui-spo", library_version=__version__
        )
    except _network_errors() as error:
        raise _unreachable(error, url, folder / name) from error
    sha256 = (metadata.etag or "").lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256) or not metadata.size:
        raise SpoError(f'"{url}" tells no size and SHA-256, so what comes could not be checked.')
    return RemoteFile(Path(name).name, url, metadata.size, sha256)


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

    Raises SpoError for another file of that name, a full disk, a broken connection, a wrong hash (what came is then
    deleted).
    """
    target = folder / remote.name
    if target.exists():
        if target.stat().st_size == remote.size_bytes and file_sha256(target) == remote.sha256:
            return target
        raise exists_already(target)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{remote.name}.{remote.sha256[:12]}.part"
    free, needed = shutil.disk_usage(folder).free, remote.size_bytes - _size_of(part)
    if free < needed:
        raise SpoError(f'"{folder}" has {size_text(free)} free; {size_text(needed)} more are needed for {remote.name}.')
    tries = 0
    while (done := _size_of(part)) < remote.size_bytes:
        try:
            _fetch(remote, part, progress, should_stop)
        except _network_errors() as error:
            came = _size_of(part)
            if came > remote.size_bytes:  # a server without ranges, and an old library that appended the whole file
                part.unlink()
            tries = 0 if came > done else tries + 1
            if getattr(error, "response", None) is not None or (tries == _TRIES and came == 0):
                raise _unreachable(error, remote.url, target) from error
            if tries == _TRIES:
                raise SpoError(
                    f"The connection broke after {size_text(came)} of {size_text(remote.size_bytes)} of {remote.name}; "
                    "fetch it again to go on from there."
                ) from error
    if file_sha256(part) != remote.sha256:
        part.unlink()
        raise SpoError(f"{remote.name} arrived damaged (its SHA-256 is wrong) and was deleted; fetch it again.")
    os.replace(part, target)
    return target


class _Watched(io.BufferedWriter):
    """A file to append to, which reports each block that is written and may end the writing."""

    def __init__(
        self, path: Path, name: str, total: int, progress: Callable[[int, int], object], should_stop: Callable[[], bool]
    ) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self.what, self.total, self.progress, self.should_stop = name, total, progress, should_stop

    def write(self, block: object) -> int:
        count = super().write(block)  # type: ignore[arg-type]
        self.progress(self.tell(), self.total)
        if self.should_stop():
            raise SpoError(f"stopped after {size_text(self.tell())} of {self.what}; fetch it again to go on.")
        return count


def _fetch(
    remote: RemoteFile, part: Path, progress: Callable[[int, int], object], should_stop: Callable[[], bool]
) -> None:
    """Append to `part` until it has its size. Raises what the hub's library raises when the connection breaks."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=False, library_name="sd-webui-spo", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # sizes and ranges are those of the file itself
    with _Watched(part, remote.name, remote.size_bytes, progress, should_stop) as file:
        http_get(
            remote.url,
            file,
            resume_size=file.tell(),
            headers=headers,
            expected_size=remote.size_bytes,
            displayed_filename=remote.name,
        )
        file.flush()
        os.fsync(file.fileno())


def _network_errors() -> tuple[type[Exception], ...]:
    """What may come from the network. Hub below 1: requests' errors, all OSErrors; from 1: httpx's, of one base."""
    from huggingface_hub.utils import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _unreachable(error: Exception, url: str, target: Path) -> SpoError:
    host = re.sub(r"^\w+://|[:/].*$", "", url.split("://")[-1])
    response = getattr(error, "response", None)
    if response is not None and response.status_code < 500:
        reason = getattr(response, "reason_phrase", None) or getattr(response, "reason", "")
        why = f"{host} answers {response.status_code} {reason}".rstrip()
    else:
        reason = str(error).split(url)[-1].strip(" :.\n").split("\n")[0]  # the address follows below
        why = f"{host} cannot be reached ({reason or type(error).__name__})"
    return SpoError(f'{why}: fetch {url} elsewhere and put it at "{target.absolute()}".')


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
