"""Votes on disk: what stands, what a crash may cost, and zips."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from PIL import Image

from spo.errors import SpoError
from spo.preference.taste.votes import VoteFolder, VotePool, comparisons, pair_id
from tests.vote_worlds import pair


def answers(folder: VoteFolder) -> list[str]:
    return [vote.answer for vote in folder.votes()]


def test_a_vote_is_kept_with_its_pair(tmp_path):
    folder, made = VoteFolder(tmp_path / "votes"), pair(0, "ein Kätzchen")
    assert folder.votes() == ()
    vote = folder.add(made, "left")
    again = VoteFolder(tmp_path / "votes")
    assert again.votes() == (vote,)
    assert vote.prompt == "ein Kätzchen" and vote.seed_left == 0 and vote.checkpoint_hash == "0123456789"
    assert torch.equal(again.latents(vote.id), made.latents)
    assert all(picture.read_bytes()[1:4] == b"PNG" for picture in again.pictures(vote.id))
    assert again.counts().left == again.counts().total == 1


def test_votes_are_changed_and_taken_back(tmp_path):
    folder = VoteFolder(tmp_path)
    first, second = folder.add(pair(0), "left"), folder.add(pair(1), "skip")
    folder.change(first.id, "tie")
    assert answers(folder) == ["tie", "skip"]
    assert folder.undo() == folder.votes()[0].__class__(**{**first.__dict__, "answer": "tie"})
    assert answers(folder) == ["left", "skip"]
    assert folder.undo() == second
    assert answers(folder) == ["left"]
    assert folder.undo() == first
    assert folder.undo() is None and folder.votes() == ()
    folder.add(pair(1), "right")
    assert answers(folder) == ["right"]
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 7  # nothing was ever rewritten


def test_a_pair_is_voted_on_once(tmp_path):
    folder = VoteFolder(tmp_path)
    folder.add(pair(0), "left")
    folder.add(pair(0), "right")
    assert answers(folder) == ["right"]


def test_unknown_answers_and_votes_are_refused(tmp_path):
    folder = VoteFolder(tmp_path)
    with pytest.raises(SpoError, match='"lfet".*left, right, tie, skip are accepted, did you mean "left"'):
        folder.add(pair(0), "lfet")
    with pytest.raises(SpoError, match="no vote"):
        folder.change("0" * 16, "left")


@pytest.mark.parametrize("kept", range(1, 12, 3))
def test_a_torn_write_loses_only_the_vote_being_written(tmp_path, kept):
    folder = VoteFolder(tmp_path)
    folder.add(pair(0), "left")
    whole = (tmp_path / "votes.jsonl").read_bytes()
    folder.add(pair(1), "right")
    torn = (tmp_path / "votes.jsonl").read_bytes()[: len(whole) + kept * 20]
    (tmp_path / "votes.jsonl").write_bytes(torn)
    assert answers(folder) == ["left"]
    folder.add(pair(2), "tie")
    assert answers(folder) == ["left", "tie"]


def test_a_line_that_is_no_vote_is_named(tmp_path):
    folder = VoteFolder(tmp_path)
    folder.add(pair(0), "left")
    lines = (tmp_path / "votes.jsonl").read_text()
    (tmp_path / "votes.jsonl").write_text("garbage\n" + lines)
    with pytest.raises(SpoError, match="line 1 of .*votes.jsonl"):
        folder.votes()
    (tmp_path / "votes.jsonl").write_text(lines.replace('"left"', '"up"'))
    with pytest.raises(SpoError, match='"up" is not known'):
        folder.votes()


def test_threads_lose_nothing(tmp_path):
    def vote(first: int) -> None:
        for number in range(first, first + 5):
            VoteFolder(tmp_path).add(pair(number), "left")

    threads = [threading.Thread(target=vote, args=(first,)) for first in range(0, 20, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert VoteFolder(tmp_path).counts().left == 20


def test_lines_of_the_file_are_as_documented(tmp_path):
    VoteFolder(tmp_path).add(pair(0), "left")
    line = json.loads((tmp_path / "votes.jsonl").read_text())
    assert list(line) == [
        "event", "id", "answer", "prompt", "seed_left", "seed_right", "from_step", "architecture",
        "checkpoint_name", "checkpoint_hash", "time",
    ]  # fmt: skip


@pytest.mark.parametrize("best", range(4))
@pytest.mark.parametrize("worst", range(4))
def test_the_best_and_the_worst_of_four_say_five_of_six(best, worst):
    if best == worst:
        with pytest.raises(SpoError, match="two different ones of 4"):
            comparisons(4, best, worst)
        return
    order = {best: 3, worst: 1}
    said = comparisons(4, best, worst)
    assert len(said) == 5
    for (left, right), answer in said.items():
        assert answer == ("left" if order.get(left, 2) > order.get(right, 2) else "right")
    assert comparisons(2, 1, 0) == {(0, 1): "right"}


def test_a_pools_votes_are_as_those_of_its_pairs(tmp_path):
    latents = torch.arange(3.0)[:, None, None, None].expand(3, 4, 2, 2)
    pictures = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 100, 200)]
    on_disk = tmp_path / "waiting.png"
    pictures[2].save(on_disk)
    pool = VotePool("a fox", latents, (*pictures[:2], on_disk), (5, 5, 5), 4, "sd15", "dream", "0123456789")
    folder = VoteFolder(tmp_path / "mine")
    made = folder.add_pool(pool, comparisons(3, 2, 0))
    assert [(vote.answer, vote.seed_left, vote.from_step) for vote in made] == [("right", 5, 4)] * 3
    assert folder.votes() == tuple(made)
    by_pair = {pair_id("a fox", latents[[i, j]]): (i, j) for i, j in ((0, 1), (0, 2), (1, 2))}
    for vote in made:
        pair = by_pair[vote.id]
        assert torch.equal(folder.latents(vote.id), latents[list(pair)])
        shades = [Image.open(path).getpixel((0, 0))[0] for path in folder.pictures(vote.id)]
        assert shades == [100 * side for side in pair]
    on_disk.unlink()
    assert all(path.stat().st_size for vote in made for path in folder.pictures(vote.id))
    assert folder.add_pool(pool, {(0, 1): "left", (1, 2): "tie"}) == []  # votes that stand stay
    with pytest.raises(SpoError, match="is not known"):
        folder.add_pool(pool, {(0, 1): "both"})


def test_a_pool_in_another_order(tmp_path):
    latents = torch.arange(3.0)[:, None, None, None].expand(3, 4, 2, 2)
    pictures = tuple(Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 100, 200))
    pool = VotePool("a", latents, pictures, (5, 6, 7), 4, "sd15", "name", "0123456789")
    other = pool.shuffled([2, 0, 1])
    assert other.seeds == (7, 5, 6) and other.pictures == (pictures[2], pictures[0], pictures[1])
    assert other.latents[:, 0, 0, 0].tolist() == [2, 0, 1]
    assert (other.prompt, other.from_step) == ("a", 4)
