"""Pairs from folders and from parquet files: order, broken pictures, errors."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from spo.errors import SpoError
from spo.preference.clip.pair_data import COLUMNS, is_held_out, open_pairs, picture_tensor


def picture(value, size=(40, 30)):
    return Image.new("RGB", size, (value, 255 - value, 128))


def png(value):
    stream = io.BytesIO()
    picture(value).save(stream, "PNG")
    return stream.getvalue()


def red(image):
    return np.asarray(image)[0, 0, 0]


def write_folder(folder, count=12):
    """Winners are redder: 200 + n against n; prompt 0 has three pairs, pair 3 is a tie."""
    folder.mkdir()
    for n in range(count):
        first, second = ("_tie0", "_tie1") if n == 3 else ("_win", "_lose")
        picture(200 + n).save(folder / f"{n:03}{first}.png")
        picture(n).save(folder / f"{n:03}{second}.jpg", quality=95)
        (folder / f"{n:03}.txt").write_text(f"prompt {0 if n < 3 else n}\n")
    return folder


def row(n, **changes):
    values = (f"prompt {n}", png(n), png(200), 0.0, 1.0, 2)
    return {**dict(zip(COLUMNS, values, strict=True)), "user_id": 7, **changes}


def write_parquet(path, rows, row_group_size=4):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


# ---- folders


def test_a_folder(tmp_path):
    source = open_pairs(write_folder(tmp_path / "pairs"))
    pairs = list(source.pairs(seed=1, epoch=0))
    assert len(source) == len(pairs) == 12 and source.skipped == 0
    assert [pair.row for pair in pairs] == list(range(12))
    for pair in pairs:
        redder_is_0 = red(pair.picture_0) > red(pair.picture_1)
        assert pair.label_0 == (0.5 if pair.caption == "prompt 3" else float(redder_is_0))
        assert pair.pairs_of_prompt == (3 if pair.caption == "prompt 0" else 1)
    assert {pair.label_0 for pair in pairs} == {0.0, 0.5, 1.0}


def test_the_order_follows_from_seed_and_epoch(tmp_path):
    folder = write_folder(tmp_path / "pairs")

    def order(seed, epoch, first_row=0):
        return [(pair.caption, red(pair.picture_0)) for pair in open_pairs(folder).pairs(seed, epoch, first_row)]

    assert order(1, 0) == order(1, 0) and order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    assert order(1, 0)[5:] == order(1, 0, 5)
    assert [caption for caption, _ in order(1, -1)][-1] == "prompt 11"


def test_captions_in_a_table(tmp_path):
    folder = write_folder(tmp_path / "pairs", 2)
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "captions.csv").write_text('name,caption\n000,"one, two"\n001,three\n')
    assert [pair.caption for pair in open_pairs(folder).pairs(0, -1)] == ["one, two", "three"]
    (folder / "captions.csv").write_text("name,text\n000,one\n")
    with pytest.raises(SpoError, match="lacks the columns caption; needed are name and caption"):
        open_pairs(folder)


def test_broken_and_lonely_pictures_are_skipped_and_counted(tmp_path):
    folder = write_folder(tmp_path / "pairs")
    whole = (folder / "004_win.png").read_bytes()
    (folder / "004_win.png").write_bytes(whole[: len(whole) // 2])
    (folder / "005_lose.jpg").write_text("no picture")
    (folder / "006_lose.jpg").unlink()
    (folder / "007.txt").unlink()
    source = open_pairs(folder)
    assert len(list(source.pairs(0, 0))) == 8
    assert source.skipped == 4


def test_folders_that_hold_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpoError, match=r"holds no pairs \(NAME_win.png, NAME_lose.png, NAME.txt\)\."):
        open_pairs(tmp_path / "empty")
    picture(1).save(tmp_path / "empty" / "a_win.png")
    with pytest.raises(SpoError, match=r"holds no pairs .*, a_lose\.\* is missing"):
        open_pairs(tmp_path / "empty")
    with pytest.raises(SpoError, match="there are no pairs at"):
        open_pairs(tmp_path / "none")
    (tmp_path / "pairs.zip").write_text("")
    with pytest.raises(SpoError, match='"pairs.zip" is no collection of pairs'):
        open_pairs(tmp_path / "pairs.zip")


# ---- parquet


def test_parquet_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", [row(n) for n in range(10)])
    write_parquet(tmp_path / "b.parquet", [row(n, label_0=0.5, label_1=0.5) for n in range(10, 13)])
    source = open_pairs(tmp_path)
    pairs = list(source.pairs(3, 0))
    assert len(source) == len(pairs) == 13
    assert [pair.row for pair in pairs] == list(range(13))
    assert sorted(int(pair.caption.split()[1]) for pair in pairs) == list(range(13))
    assert all(red(pair.picture_0) == int(pair.caption.split()[1]) for pair in pairs)
    assert all(pair.label_0 == (0.5 if int(pair.caption.split()[1]) > 9 else 0.0) for pair in pairs)
    captions = [pair.caption for pair in pairs]
    assert captions[7:] == [pair.caption for pair in open_pairs(tmp_path).pairs(3, 0, 7)]
    assert captions != [pair.caption for pair in open_pairs(tmp_path).pairs(3, 1)]


def test_only_one_row_group_is_read_at_a_time(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [row(n) for n in range(20)], row_group_size=5)
    import pyarrow.parquet as parquet

    read = []
    original = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda file, i, **more: read.append(i) or original(file, i, **more)
    )
    pairs = open_pairs(tmp_path / "a.parquet").pairs(0, 0)
    for count in range(1, 8):
        next(pairs)
        assert len(read) == (count + 4) // 5
    read.clear()
    next(open_pairs(tmp_path / "a.parquet").pairs(0, 0, 12))  # skipped row groups are not read
    assert len(read) == 1


def test_unusable_rows_are_skipped_and_counted(tmp_path):
    rows = [
        row(0),
        row(1, jpg_0=png(1)[:40]),
        row(2, jpg_1=None),
        row(3, label_0=None),
        row(4, label_0=0.0, label_1=0.0),
        row(5, caption=None),
        row(6, num_example_per_prompt=None),
    ]
    source = open_pairs(write_parquet(tmp_path / "a.parquet", rows))
    assert sorted(pair.caption for pair in source.pairs(0, 0)) == ["prompt 0", "prompt 6"]
    assert source.skipped == 5


def test_wrong_parquet_files_are_one_sentence(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"caption": "x", "jpg_0": png(1)}])
    with pytest.raises(SpoError, match='"a.parquet" lacks the columns jpg_1, label_0, label_1, num_example_per_prompt'):
        open_pairs(path)
    write_parquet(path, [row(n) for n in range(4)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SpoError, match='"a.parquet" is truncated or no parquet file'):
        open_pairs(path)


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SpoError, match="reading parquet files needs the package pyarrow: pip install pyarrow"):
        open_pairs(tmp_path / "a.parquet")


# ---- pictures and prompts


def test_pictures_are_covered_and_cut():
    wide = Image.new("RGB", (90, 30), (0, 0, 0))
    wide.paste((255, 255, 255), (30, 0, 60, 30))  # the middle third
    tensor = picture_tensor(wide, 16, 16)
    assert tensor.shape == (3, 16, 16) and torch.equal(tensor[:, :, 1:-1], torch.ones(3, 16, 14))
    assert picture_tensor(Image.new("L", (50, 20)), 24, 8).shape == (3, 8, 24)


def test_one_prompt_in_so_many_is_held_out():
    held = [is_held_out(f"prompt {n}", 10) for n in range(2000)]
    assert 150 < sum(held) < 250
    assert not any(is_held_out(f"prompt {n}", 0) for n in range(50))
