"""Votes as a zip: taken along and put together; what is refused."""

from __future__ import annotations

import zipfile
from types import SimpleNamespace

import pytest
import torch

from spo.errors import SpoError
from spo.preference.taste import vote_zip
from spo.preference.taste.vote_zip import VoteImport, export_votes, import_votes
from spo.preference.taste.votes import LINES, VoteFolder
from tests.vote_worlds import pair


def test_export_and_import(tmp_path):
    mine, yours = VoteFolder(tmp_path / "mine"), VoteFolder(tmp_path / "yours")
    shared, disputed = mine.add(pair(0), "left"), mine.add(pair(1), "left")
    mine.add(pair(2), "tie")
    yours.add(pair(0), "left")
    yours.add(pair(1), "right")
    assert export_votes(mine, tmp_path / "votes.zip") == 3
    with pytest.raises(SpoError, match="exists already"):
        export_votes(mine, tmp_path / "votes.zip")
    before = yours.pictures(shared.id)[0].stat().st_mtime_ns
    assert import_votes(yours, tmp_path / "votes.zip") == VoteImport(added=1, duplicates=1, conflicts=1)
    assert import_votes(yours, tmp_path / "votes.zip") == VoteImport(added=0, duplicates=2, conflicts=1)
    assert {vote.id: vote.answer for vote in yours.votes()}[disputed.id] == "right"
    assert yours.pictures(shared.id)[0].stat().st_mtime_ns == before
    new = yours.votes()[-1]
    assert torch.equal(yours.latents(new.id), mine.latents(new.id)) and new.answer == "tie"


def rewritten(source, target, change) -> None:
    """A zip like `source`, each (name, content) put through `change`, which may give several."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            for changed, content in change(name, old.read(name)):
                new.writestr(changed, content)


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "pairs/../../evil.png", "C:\\evil.png", "pairs/other.png"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    mine, yours = VoteFolder(tmp_path / "mine"), VoteFolder(tmp_path / "in" / "yours")
    mine.add(pair(0), "left")
    export_votes(mine, tmp_path / "votes.zip")
    rewritten(
        tmp_path / "votes.zip",
        tmp_path / "evil.zip",
        lambda n, c: [(n, c), (name, b"evil")] if n == LINES else [(n, c)],
    )
    with pytest.raises(SpoError, match="is refused"):
        import_votes(yours, tmp_path / "evil.zip")
    assert not (tmp_path / "in").exists()


def test_ids_that_are_paths_are_refused(tmp_path):
    mine = VoteFolder(tmp_path / "mine")
    vote = mine.add(pair(0), "left")
    export_votes(mine, tmp_path / "votes.zip")
    rewritten(
        tmp_path / "votes.zip",
        tmp_path / "evil.zip",
        lambda n, c: [(n, c.replace(vote.id.encode(), b"../../../../evil"))],
    )
    with pytest.raises(SpoError, match="16 hexadecimal digits"):
        import_votes(VoteFolder(tmp_path / "yours"), tmp_path / "evil.zip")


def test_what_is_no_zip_of_votes_is_refused(tmp_path):
    folder = VoteFolder(tmp_path / "votes")
    mine = VoteFolder(tmp_path / "mine")
    mine.add(pair(0), "left")
    mine.add(pair(1), "left")
    export_votes(mine, tmp_path / "votes.zip")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(SpoError, match="cannot be read as a zip"):
        import_votes(folder, tmp_path / "text.zip")
    rewritten(
        tmp_path / "votes.zip", tmp_path / "less.zip", lambda n, c: [(n, c)] if not n.endswith("left.png") else []
    )
    with pytest.raises(SpoError, match="lacks"):
        import_votes(folder, tmp_path / "less.zip")
    rewritten(tmp_path / "votes.zip", tmp_path / "bad.zip", lambda n, c: [(n, b"x" if n.endswith(".png") else c)])
    with pytest.raises(SpoError, match="damaged"):
        import_votes(folder, tmp_path / "bad.zip")
    swapped = [mine.votes()[0].id, mine.votes()[1].id]
    rewritten(
        tmp_path / "votes.zip", tmp_path / "swap.zip",
        lambda n, c: [(n.replace(swapped[0], "?").replace(swapped[1], swapped[0]).replace("?", swapped[1]), c)],
    )  # fmt: skip
    with pytest.raises(SpoError, match="another id"):
        import_votes(folder, tmp_path / "swap.zip")
    assert folder.votes() == ()


def test_a_zip_is_limited_in_total(tmp_path, monkeypatch):
    """Ten files of 60 MB of zeros each, which are 600 kB packed; each is small enough by itself."""
    mine, yours = VoteFolder(tmp_path / "mine"), VoteFolder(tmp_path / "yours")
    mine.add(pair(0), "left")
    export_votes(mine, tmp_path / "votes.zip")
    with zipfile.ZipFile(tmp_path / "votes.zip", "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(10):
            archive.writestr(f"pairs/{number}.png", bytes(60_000_000))
    assert (tmp_path / "votes.zip").stat().st_size < 10e6
    monkeypatch.setattr(vote_zip, "_LARGEST_TOTAL_BYTES", 2**29)
    with pytest.raises(SpoError, match=r"unpacks to 0\.6 GiB; at most 0\.5 GiB are accepted"):
        import_votes(yours, tmp_path / "votes.zip")
    monkeypatch.undo()
    monkeypatch.setattr(vote_zip.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**28))
    with pytest.raises(SpoError, match=r"at most 0\.2 GiB are free on the disk"):
        import_votes(yours, tmp_path / "votes.zip")
    assert not yours.path.exists()
