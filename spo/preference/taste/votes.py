"""The user's votes: a folder that only grows, written so that a crash loses at most the vote being written.

    FOLDER/votes.jsonl                 one JSON object a line, only ever appended
    FOLDER/pairs/ID.safetensors        `latents` [2, C, h, w] float16, left and right, clean, as the VAE expects them;
                                       `text` [D] float16, the checkpoint's feature of the prompt, where it is known
    FOLDER/pairs/ID_left.png, ID_right.png   the two pictures

ID is a hash of prompt and latents, so a pair is voted on once in a folder, and the same vote imported twice is known.
Lines of votes.jsonl:

    {"event": "vote", "id": ..., "answer": "left", "prompt": ..., "seed_left": ..., "seed_right": ..., "from_step": ...,
     "architecture": "sd15", "checkpoint_name": ..., "checkpoint_hash": ..., "time": "2026-01-31T12:00:00Z"}
    {"event": "change", "id": ..., "answer": "tie", "time": ...}     supersedes the answer
    {"event": "undo", "time": ...}                                   takes back the newest event that still stands

A line that a crash tore is the last one: readers pass over it, the next writer cuts it off. A pair's files are whole
on disk before its line is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.errors import SpoError, nearest
from spo.files import write_whole
from spo.images import to_picture

if TYPE_CHECKING:
    from torch import Tensor

ANSWERS = ("left", "right", "tie", "skip")
LINES = "votes.jsonl"
PAIRS = "pairs"
_LOCKS: dict[Path, threading.RLock] = {}  # one for each folder, whatever number of objects look at it
_LOCKS_LOCK = threading.Lock()


@dataclass(frozen=True)
class VotePair:
    """Two finished pictures of one prompt, to be voted on. See `vote_pairs.make_pairs`.

    latents    [2, C, h, w] left and right, clean, as the VAE expects them
    pixels     [2, 3, height, width] in [-1, 1]
    seed_left, seed_right  equal when the pictures part ways at `from_step`
    from_step  first step whose noise differs; -1: different from the start (two seeds)
    architecture  "sd15" or "sdxl", whose latents these are
    text       [D] the checkpoint's own feature of the prompt (`Host.text_features`); None where it is not known
    """

    prompt: str
    latents: Tensor
    pixels: Tensor
    seed_left: int
    seed_right: int
    from_step: int
    architecture: str
    checkpoint_name: str
    checkpoint_hash: str
    text: Tensor | None = None

    @property
    def id(self) -> str:
        """See `pair_id`."""
        return pair_id(self.prompt, self.latents)

    @property
    def pool(self) -> VotePool:
        """The same as a pool of two."""
        return VotePool(
            self.prompt, self.latents, tuple(to_picture(pixels) for pixels in self.pixels),
            (self.seed_left, self.seed_right), self.from_step, self.architecture, self.checkpoint_name,
            self.checkpoint_hash, self.text,
        )  # fmt: skip


@dataclass(frozen=True)
class VotePool:
    """Finished pictures of one prompt, of which the best and the worst are named; two are a pair.

    latents    [K, C, h, w] clean, as the VAE expects them
    pictures   K of them, on disk or in memory: `PIL.Image.Image` or a path to a PNG file
    seeds      K; equal where the pictures part ways at `from_step`; the rest as in `VotePair`
    """

    prompt: str
    latents: Tensor
    pictures: tuple[Any, ...]
    seeds: tuple[int, ...]
    from_step: int
    architecture: str
    checkpoint_name: str
    checkpoint_hash: str
    text: Tensor | None = None

    @property
    def id(self) -> str:
        """See `pair_id`."""
        return pair_id(self.prompt, self.latents)

    def __len__(self) -> int:
        return len(self.seeds)

    def shuffled(self, order: Sequence[int]) -> VotePool:
        """The pictures in another order: the first is the seed's ordinary one, and shall not always be on the left."""
        pictures, seeds = (tuple(values[n] for n in order) for values in (self.pictures, self.seeds))
        return replace(self, latents=self.latents[list(order)], pictures=pictures, seeds=seeds)


def comparisons(count: int, best: int, worst: int) -> dict[tuple[int, int], str]:
    """What naming the best and the worst of a pool says: (i, j) with i < j -> "left" or "right".

    2 count - 3 of the count (count - 1) / 2 comparisons: of four pictures five of six. Raises SpoError for positions
    that are equal, or none of the pool's.
    """
    if best == worst or not (0 <= best < count and 0 <= worst < count):
        raise SpoError(f"best {best + 1} and worst {worst + 1} are given; accepted are two different ones of {count}.")
    said = {}
    for first in range(count):
        for second in range(first + 1, count):
            if best in (first, second) or worst in (first, second):
                said[first, second] = "left" if first == best or second == worst else "right"
    return said


@dataclass(frozen=True)
class Vote:
    """One vote that stands. answer: one of `ANSWERS`; time: UTC, ISO 8601; the rest as in `VotePair`."""

    id: str
    answer: str
    prompt: str
    seed_left: int
    seed_right: int
    from_step: int
    architecture: str
    checkpoint_name: str
    checkpoint_hash: str
    time: str


@dataclass(frozen=True)
class VoteCounts:
    """How many votes stand, by answer."""

    left: int = 0
    right: int = 0
    tie: int = 0
    skip: int = 0

    @property
    def total(self) -> int:
        return self.left + self.right + self.tie + self.skip


class VoteFolder:
    """The votes in a folder, which is made at the first vote. Safe to use from several threads.

    Every call reads what is on disk, so that two windows on one folder see the same votes. One process should write.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise SpoError(f'"{self.path}" is a file; votes need a folder.')
        with _LOCKS_LOCK:
            self.lock = _LOCKS.setdefault(self.path.absolute(), threading.RLock())

    # ---- reading

    def votes(self) -> tuple[Vote, ...]:
        """The votes that stand, oldest first, changed ones with their last answer. SpoError for a line that is none."""
        with self.lock:
            return tuple(_standing(self._events(), self.path / LINES).values())

    def counts(self) -> VoteCounts:
        """How many votes stand, by answer."""
        answers = [vote.answer for vote in self.votes()]
        return VoteCounts(*(answers.count(answer) for answer in ANSWERS))

    def latents(self, vote_id: str) -> Tensor:
        """[2, C, h, w] float32 clean latents of a pair, left and right. SpoError when they are missing."""
        from safetensors.torch import load_file

        path = self._file(vote_id, ".safetensors")
        if not path.exists():
            raise SpoError(f'the latents of vote "{vote_id}" are missing: there is no "{path}".')
        return load_file(path)["latents"].float()

    def text(self, vote_id: str) -> Tensor | None:
        """[D] float32 feature of the prompt of a pair whose latents are there; None for votes that carry none."""
        from safetensors import safe_open

        with safe_open(self._file(vote_id, ".safetensors"), framework="pt") as file:
            return file.get_tensor("text").float() if "text" in file.keys() else None  # noqa: SIM118

    def pictures(self, vote_id: str) -> tuple[Path, Path]:
        """The PNG files of a pair, left and right."""
        return self._file(vote_id, "_left.png"), self._file(vote_id, "_right.png")

    # ---- writing

    def add(self, pair: VotePair, answer: str) -> Vote:
        """Record a vote and its pair; a pair that has been voted on already gets the new answer, as by `change`."""
        with self.lock:
            new = self.add_pool(pair.pool, {(0, 1): answer})
            return new[0] if new else self.change(pair.id, answer)

    def add_pool(self, pool: VotePool, answers: Mapping[tuple[int, int], str]) -> list[Vote]:
        """Record votes on pairs of a pool's pictures, all or none; a pair that has a vote already keeps it.

        answers  positions (i, j) of the left and the right picture -> answer; see `comparisons`
        """
        for answer in answers.values():
            _check_answer(answer)
        with self.lock:
            standing = {vote.id for vote in self.votes()}
            new = []
            for (left, right), answer in answers.items():
                latents = pool.latents[[left, right]]
                vote = Vote(
                    pair_id(pool.prompt, latents), answer, pool.prompt, pool.seeds[left], pool.seeds[right],
                    pool.from_step, pool.architecture, pool.checkpoint_name, pool.checkpoint_hash, _now(),
                )  # fmt: skip
                if vote.id not in standing:
                    self._write_files(vote.id, latents, (pool.pictures[left], pool.pictures[right]), pool.text)
                    new.append(vote)
            if new:
                self.append_votes(new)
            return new

    def change(self, vote_id: str, answer: str) -> Vote:
        """Give a vote another answer. Raises SpoError for a vote that does not stand."""
        _check_answer(answer)
        with self.lock:
            standing = {vote.id: vote for vote in self.votes()}
            if vote_id not in standing:
                raise SpoError(f'there is no vote "{vote_id}" in "{self.path}" to change.')
            if standing[vote_id].answer != answer:
                self._append([{"event": "change", "id": vote_id, "answer": answer, "time": _now()}])
            return replace(standing[vote_id], answer=answer)

    def undo(self) -> Vote | None:
        """Take back the newest vote or change that stands. The vote it was about, as it was; None: nothing to undo."""
        with self.lock:
            before = _standing(self._events(), self.path / LINES)
            newest = _events_that_stand(self._events())
            if not newest:
                return None
            self._append([{"event": "undo", "time": _now()}])
            return before[newest[-1]["id"]]

    def append_votes(self, votes: Sequence[Vote]) -> None:
        """Append votes whose pairs' files are there already, in one write; for `add` and for importing."""
        with self.lock:
            self._append([{"event": "vote", **asdict(vote)} for vote in votes])

    # ---- files

    def _file(self, vote_id: str, ending: str) -> Path:
        return self.path / PAIRS / f"{vote_id}{ending}"

    def _write_files(self, vote_id: str, latents: Tensor, pictures: Sequence[Any], text: Tensor | None) -> None:
        """pictures: left and right, as in `VotePool`; files are linked where the system can, so they are there once."""
        from safetensors.torch import save_file

        try:
            (self.path / PAIRS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpoError(f'the folder "{self.path}" cannot be made: {error.strerror}.') from error
        write_whole(self._file(vote_id, ".safetensors"), lambda path: save_file(pair_tensors(latents, text), path))
        for picture, path in zip(pictures, self.pictures(vote_id), strict=True):
            write_whole(path, partial(_write_picture, picture))

    def _events(self) -> list[dict[str, Any]]:
        """The lines of the file as objects, without a torn last one."""
        path = self.path / LINES
        if not path.exists():
            return []
        text = path.read_bytes()
        events = []
        for number, line in enumerate(text.split(b"\n")[:-1], 1):
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or "event" not in event:
                    raise ValueError("it is no event")
            except ValueError as error:
                raise SpoError(f'line {number} of "{path}" is no vote ({error}); mend or delete that line.') from error
            events.append(event)
        return events

    def _append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Append whole lines in one write and flush them to disk; a torn last line is cut off before."""
        path = self.path / LINES
        lines = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            with path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SpoError(f'"{path}" cannot be written: {error.strerror}.') from error


def _write_picture(picture: Any, path: Path) -> None:
    if not isinstance(picture, Path):
        picture.save(path, "PNG")
        return
    try:
        os.link(picture, path)
    except OSError:  # no hard links in this file system
        shutil.copyfile(picture, path)


def _cut_torn_line(path: Path) -> None:
    with suppress(FileNotFoundError), path.open("rb+") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


def _events_that_stand(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Votes and changes without those that were taken back."""
    standing: list[dict[str, Any]] = []
    for event in events:
        if event["event"] != "undo":
            standing.append(event)
        elif standing:
            standing.pop()
    return standing


def _standing(events: Sequence[dict[str, Any]], source: Path) -> dict[str, Vote]:
    """id -> vote, in the order of voting."""
    votes: dict[str, Vote] = {}
    for event in _events_that_stand(events):
        if event["event"] == "vote":
            vote = vote_of(event, str(source))
            votes[vote.id] = vote
        elif event["event"] == "change" and event.get("id") in votes and event.get("answer") in ANSWERS:
            votes[event["id"]] = replace(votes[event["id"]], answer=event["answer"])
        else:
            raise SpoError(f'"{source}" holds an event that makes no sense: {json.dumps(event)[:200]}.')
    return votes


def vote_of(event: Mapping[str, Any], source: str) -> Vote:
    """A vote from its JSON object. Raises SpoError, naming `source`, for a field that is missing or of another kind."""
    values: dict[str, Any] = {}
    for field in fields(Vote):
        value = event.get(field.name)
        kind = int if field.type == "int" else str
        if not isinstance(value, kind) or isinstance(value, bool):
            raise SpoError(f"A vote in {source} has {field.name} {value!r}, which is no {kind.__name__}.")
        values[field.name] = value
    _check_answer(values["answer"])
    if len(values["id"]) != 16 or not set(values["id"]) <= set("0123456789abcdef"):
        raise SpoError(f"A vote in {source} has the id {values['id']!r}; 16 hexadecimal digits are accepted.")
    return Vote(**values)


def pair_tensors(latents: Tensor, text: Tensor | None) -> dict[str, Tensor]:
    """What is kept of a pair or pool: its latents and its prompt's feature, if it is known, in float16 on the CPU."""
    tensors = {"latents": latents} if text is None else {"latents": latents, "text": text}
    return {name: value.detach().cpu().half().contiguous() for name, value in tensors.items()}


def pair_id(prompt: str, latents: Tensor) -> str:
    """16 hexadecimal digits of a hash of a pair's prompt and latents (as float16)."""
    content = latents.detach().cpu().half().contiguous().numpy().tobytes()
    return hashlib.sha256(prompt.encode() + b"\0" + content).hexdigest()[:16]


def _check_answer(answer: str) -> None:
    if answer not in ANSWERS:
        raise SpoError(
            f'the answer "{answer}" is not known; {", ".join(ANSWERS)} are accepted{nearest(answer, ANSWERS)}.'
        )


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
