"""Pools that wait on disk: whole or not there, and gone when they have been voted on."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image

from spo.errors import SpoError
from spo.preference.taste.votes import VoteFolder, VotePool, comparisons
from spo.preference.taste.waiting import WaitingPools


def pool(seed, size=4):
    latents = torch.randn(size, 4, 2, 2, generator=torch.Generator().manual_seed(seed)).half().float()
    pictures = tuple(Image.new("RGB", (16, 16), (40 * n, seed, 0)) for n in range(size))
    return VotePool("a fox", latents, pictures, (seed,) * size, 4, "sd15", "dream", "0123456789")


def everything(pool):
    return True


@pytest.fixture
def votes(tmp_path):
    return VoteFolder(tmp_path / "mine")


def test_what_is_written_is_read(votes):
    waiting = WaitingPools(votes)
    made = [waiting.add(pool(seed)) for seed in (1, 2)]
    read = WaitingPools(votes).all(everything)
    assert [one.id for one in read] == [one.id for one in made] == [pool(1).id, pool(2).id]
    assert torch.equal(read[0].latents, pool(1).latents) and read[0].seeds == (1, 1, 1, 1)
    assert [Image.open(path).getpixel((0, 0))[0] for path in read[0].pictures] == [0, 40, 80, 120]
    assert [one.id for one in waiting.all(lambda one: one.seeds[0] == 2)] == [pool(2).id]
    waiting.remove(made[0])
    assert [one.id for one in waiting.all(everything)] == [made[1].id]


def test_what_was_voted_on_or_is_damaged_is_deleted(votes):
    waiting = WaitingPools(votes)
    first, second, third, fourth = (waiting.add(pool(seed)) for seed in range(4))
    votes.add_pool(first, comparisons(4, 2, 0))
    second.pictures[3].unlink()
    (waiting.path / third.id / "latents.safetensors").write_bytes(b"cut")
    (waiting.path / ".making-0123").mkdir()
    assert [one.id for one in waiting.all(everything)] == [fourth.id]
    assert [place.name for place in waiting.path.iterdir()] == [fourth.id]
    assert all(path.exists() for vote in votes.votes() for path in votes.pictures(vote.id))


def test_a_full_disk_is_a_sentence_and_leaves_no_pool(votes, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SpoError, match="cannot be written: No space left"):
        WaitingPools(votes).add(pool(1))
    monkeypatch.undo()
    assert WaitingPools(votes).all(everything) == []
