"""Votes as one zip file: taken along, shared, put together again. Importing never overwrites anything.

votes.jsonl, pairs/ID.safetensors, pairs/ID_left.png, pairs/ID_right.png     as in a vote folder, standing votes only
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from spo.errors import SpoError
from spo.files import named_when_whole
from spo.preference.taste.votes import LINES, PAIRS, Vote, VoteFolder, pair_id, vote_of

ENDINGS = (".safetensors", "_left.png", "_right.png")
_LARGEST_BYTES = 64 * 2**20  # of one file in the zip, unpacked
_LARGEST_TOTAL_BYTES = 16 * 2**30  # of all of them: some 4,000 pairs of SDXL


@dataclass(frozen=True)
class VoteImport:
    """What came of an import.

    added  new votes; duplicates: already here with the same answer; conflicts: here with another answer, which stays
    """

    added: int
    duplicates: int
    conflicts: int


def export_votes(folder: VoteFolder, path: Path) -> int:
    """Write the votes that stand to a new zip file; how many they are. SpoError when it exists or a file is missing."""
    with folder.lock, named_when_whole(path, replace=False) as temporary:
        votes = folder.votes()
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            lines = [json.dumps({"event": "vote", **asdict(vote)}, ensure_ascii=False) + "\n" for vote in votes]
            archive.writestr(LINES, "".join(lines))
            for name in (f"{PAIRS}/{vote.id}{ending}" for vote in votes for ending in ENDINGS):
                if not (folder.path / name).exists():
                    raise SpoError(f'the votes cannot be exported: "{folder.path / name}" is missing.')
                archive.write(folder.path / name, name)
    return len(votes)


def import_votes(folder: VoteFolder, path: Path) -> VoteImport:
    """Add the votes of a zip file that `export_votes` wrote. A vote that is here already stays as it is.

    Raises SpoError, and adds no vote, when the file is no such zip, is incomplete, holds other files or names that lead
    out of the folder, a pair whose latents do not belong to its id, or more than is accepted or the disk has room for.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_size(archive, path, shutil.disk_usage(_existing(folder.path)).free)
            votes = _read_votes(archive, path)
            _check_names(archive, votes, path)
            with folder.lock:
                here = {vote.id: vote for vote in folder.votes()}
                new = [vote for vote in votes if vote.id not in here]
                for vote in new:
                    _check_pair(archive, vote, path)
                for vote in new:
                    _unpack(archive, vote, folder.path / PAIRS)
                if new:
                    folder.append_votes(new)
                known = [vote for vote in votes if vote.id in here]
                conflicts = sum(here[vote.id].answer != vote.answer for vote in known)
                return VoteImport(len(new), len(known) - conflicts, conflicts)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise SpoError(f'"{path}" cannot be read as a zip file of votes ({error}).') from error


def _check_size(archive: zipfile.ZipFile, path: Path, free_bytes: int) -> None:
    """Before anything is unpacked. A file never unpacks to more than the size that it states."""
    total = sum(info.file_size for info in archive.infolist())
    for limit, what in ((_LARGEST_TOTAL_BYTES, "are accepted"), (free_bytes, "are free on the disk")):
        if total > limit:
            raise SpoError(f'"{path}" unpacks to {total / 2**30:.1f} GiB; at most {limit / 2**30:.1f} GiB {what}.')


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _read(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise SpoError(f'"{path}" is no zip file of votes: it lacks "{name}".') from None
    if info.file_size > _LARGEST_BYTES:
        raise SpoError(f'"{name}" in "{path}" has {info.file_size} bytes; at most {_LARGEST_BYTES} are accepted.')
    return archive.read(info)


def _read_votes(archive: zipfile.ZipFile, path: Path) -> list[Vote]:
    """Each id once, with its last answer."""
    votes: dict[str, Vote] = {}
    for number, line in enumerate(_read(archive, LINES, path).splitlines(), 1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise SpoError(f'line {number} of {LINES} in "{path}" is no vote ({error}).') from error
        vote = vote_of(event if isinstance(event, dict) else {}, f'"{path}"')
        votes[vote.id] = vote
    return list(votes.values())


def _check_names(archive: zipfile.ZipFile, votes: Iterable[Vote], path: Path) -> None:
    expected = {LINES} | {f"{PAIRS}/{vote.id}{ending}" for vote in votes for ending in ENDINGS}
    for name in archive.namelist():
        leads_out = name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts
        if name not in expected and (leads_out or not name.endswith("/")):
            why = "leads out of the folder" if leads_out else "belongs to no vote"
            raise SpoError(f'"{path}" is refused: the name "{name}" in it {why}.')


def _check_pair(archive: zipfile.ZipFile, vote: Vote, path: Path) -> None:
    from PIL import Image
    from safetensors import SafetensorError
    from safetensors.torch import load

    contents = [_read(archive, f"{PAIRS}/{vote.id}{ending}", path) for ending in ENDINGS]
    try:
        tensors = load(contents[0])
        latents, text = tensors["latents"], tensors.get("text")
        actual_id = pair_id(vote.prompt, latents)
        for content in contents[1:]:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                picture.verify()
    except (SafetensorError, KeyError, OSError, SyntaxError, ValueError) as error:
        raise SpoError(f'the pair "{vote.id}" in "{path}" is damaged ({error}).') from error
    if text is not None and (text.ndim != 1 or not bool(text.isfinite().all())):
        raise SpoError(f'the pair "{vote.id}" in "{path}" is damaged: what it says of the prompt is no vector.')
    if actual_id != vote.id or latents.ndim != 4 or len(latents) != 2:
        raise SpoError(f'the pair "{vote.id}" in "{path}" is damaged: its latents belong to another id.')


def _unpack(archive: zipfile.ZipFile, vote: Vote, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for ending in ENDINGS:
        target = folder / f"{vote.id}{ending}"
        if target.exists():
            continue
        with suppress(FileExistsError), named_when_whole(target, replace=False) as temporary:
            temporary.write_bytes(archive.read(f"{PAIRS}/{vote.id}{ending}"))
