"""Files that are written whole or not at all, and never over another one by accident."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spo.errors import SpoError

PATIENCE_S = (0.1, 0.5, 2.0)  # between tries to write a file that something else holds


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, which replaces `path` in one step when it is on disk."""
    with named_when_whole(path, replace=True) as temporary:
        write(temporary)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all; UTF-8, newlines as given."""
    write_whole(path, lambda temporary: temporary.write_bytes(text.encode()))


def size_text(size_bytes: int) -> str:
    """Bytes as people read them: 5.22 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes / 1e3:.0f} kB"


def write_patiently(write: Callable[[], object], path: Path, say: Callable[[str], None]) -> bool:
    """`write()`, which writes `path`, tried again for some seconds while the system refuses: a virus scanner or an open
    spreadsheet lets go of a file soon. Then it is said, and False: the work that is to be saved is worth more.

    An SpoError that the system's refusal caused counts as one; others pass through.
    """
    for wait_s in (*PATIENCE_S, None):
        try:
            write()
            return True
        except (OSError, SpoError) as error:
            refusal = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(refusal, OSError):
                raise
            if wait_s is None:
                say(f'"{path}" cannot be written ({refusal.strerror or refusal}); going on without.')
                return False
        time.sleep(wait_s)
    return False


def exists_already(path: Path) -> SpoError:
    """What to raise when a file may not be replaced."""
    return SpoError(f'"{path}" exists already; choose another name, or allow it to be replaced.')


@contextmanager
def named_when_whole(path: Path, *, replace: bool) -> Iterator[Path]:
    """A free name in the folder of `path` to write to; the file there becomes `path` unless the block raises.

    replace  off: raises SpoError when `path` exists by then, also when another process makes it at the same moment
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _name_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # not every system lets a folder be flushed
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _name_new(temporary: Path, path: Path) -> None:
    """Give the file its name unless the name is taken: two writers cannot both succeed."""
    try:
        os.link(temporary, path)
        return
    except FileExistsError:
        raise exists_already(path) from None
    except OSError:  # no hard links in this file system: claim the name with an empty file, then put ours in its place
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise exists_already(path) from None
    try:
        os.replace(temporary, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
