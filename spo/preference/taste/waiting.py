"""Pools that are made and not yet voted on: on disk, so that they can be made at night and voted on in the morning.

    FOLDER/waiting/ID/pool.json          prompt, seeds and the rest of `VotePool`
    FOLDER/waiting/ID/latents.safetensors   `latents` [K, C, h, w] float16, `text` as in pairs
    FOLDER/waiting/ID/0.png ...          its K pictures

A pool's folder gets its name when it is whole; what a crash leaves has another name and is deleted by the next reader.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from spo.errors import SpoError
from spo.preference.taste.votes import VoteFolder, VotePool, pair_id, pair_tensors

_UNFINISHED = ".making-"


class WaitingPools:
    """The pools that wait in a vote folder."""

    def __init__(self, folder: VoteFolder) -> None:
        self.votes, self.path = folder, folder.path / "waiting"

    def add(self, pool: VotePool) -> VotePool:
        """Write a pool, whole or not at all; the same pool, with its pictures on disk. SpoError when that fails."""
        from safetensors.torch import save_file

        unfinished, place = self.path / f"{_UNFINISHED}{secrets.token_hex(6)}", self.path / pool.id
        try:
            unfinished.mkdir(parents=True)
            save_file(pair_tensors(pool.latents, pool.text), unfinished / "latents.safetensors")
            for number, picture in enumerate(pool.pictures):
                picture.save(unfinished / f"{number}.png", "PNG")
            facts = {
                "prompt": pool.prompt,
                "seeds": pool.seeds,
                "from_step": pool.from_step,
                "architecture": pool.architecture,
                "checkpoint_name": pool.checkpoint_name,
                "checkpoint_hash": pool.checkpoint_hash,
            }
            (unfinished / "pool.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
            if place.exists():
                shutil.rmtree(unfinished)
            else:
                os.replace(unfinished, place)
        except OSError as error:
            raise SpoError(f'"{place}" cannot be written: {error.strerror or error}.') from error
        return self._read(place)

    def all(self, fits: Callable[[VotePool], bool]) -> list[VotePool]:
        """Those that fit, the oldest first. What is damaged, or has been voted on, is deleted."""
        return [pool for pool in self._pools(delete=True) if fits(pool)]

    def to_vote_on(self) -> list[VotePool]:
        """Those without a vote, the oldest first; nothing is deleted, since another may be writing or showing it."""
        return self._pools(delete=False)

    def _pools(self, *, delete: bool) -> list[VotePool]:
        voted = {vote.id for vote in self.votes.votes()}
        pools = []
        for place in sorted(self.path.glob("*"), key=_made_at):
            try:
                if place.name.startswith(_UNFINISHED):
                    raise ValueError("unfinished")
                pool = self._read(place)
                if voted & _ids(pool):
                    raise ValueError("voted on")
                pools.append(pool)
            except (SpoError, OSError, ValueError, KeyError, TypeError):
                if delete:
                    shutil.rmtree(place, ignore_errors=True)
        return pools

    def remove(self, pool: VotePool) -> None:
        """It has been voted on, and will not come back."""
        shutil.rmtree(self.path / pool.id, ignore_errors=True)

    def _read(self, place: Path) -> VotePool:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        facts = json.loads((place / "pool.json").read_text(encoding="utf-8"))
        try:
            tensors = load_file(place / "latents.safetensors")
            latents, text = tensors["latents"].float(), tensors.get("text")
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        pictures = tuple(place / f"{number}.png" for number in range(len(facts["seeds"])))
        if len(latents) != len(pictures) or not all(path.is_file() for path in pictures):
            raise ValueError("incomplete")
        text = None if text is None else text.float()
        return VotePool(
            **{**facts, "latents": latents, "pictures": pictures, "seeds": tuple(facts["seeds"]), "text": text}
        )


def _made_at(place: Path) -> int:
    try:
        return place.stat().st_mtime_ns
    except OSError:  # got its name, or was deleted, meanwhile
        return 0


def _ids(pool: VotePool) -> set[str]:
    """Of the votes that its pairs may have."""
    pairs = [(i, j) for i in range(len(pool)) for j in range(i + 1, len(pool))]
    return {pair_id(pool.prompt, pool.latents[list(pair)]) for pair in pairs}
