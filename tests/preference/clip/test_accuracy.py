"""A run's accuracy.csv as a table and as curves."""

from __future__ import annotations

import pytest
from PIL import Image

from spo.errors import SpoError
from spo.preference.clip.accuracy import accuracy_curves, accuracy_table

HEADER = "batch,pairs,1,951\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "accuracy.csv"
    path.write_text(f"{HEADER}0,16,0.5,0.4375\n200,16,0.75,0.625\n")
    return path


def test_a_row_a_measurement_and_a_column_a_timestep(path):
    assert [line.split() for line in accuracy_table(path).splitlines()] == [
        ["update", "t", "=", "1", "t", "=", "951"],
        ["------", "-----", "-------"],
        ["0", "0.5", "0.4375"],
        ["200", "0.75", "0.625"],
    ]
    assert accuracy_table(path, markdown=True).splitlines()[-1] == "|    200 |  0.75 |   0.625 |"


@pytest.mark.parametrize("measurements", [1, 2])
def test_curves_are_drawn_from_the_first_measurement_on(path, tmp_path, measurements):
    pytest.importorskip("matplotlib")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: 1 + measurements]))
    accuracy_curves(path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 2 * picture.height
        assert len(set(picture.convert("L").getdata())) > 50
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), (HEADER, "no pair was held out")])
@pytest.mark.parametrize("read", [accuracy_table, lambda path: accuracy_curves(path, path.with_suffix(".png"))])
def test_nothing_measured_is_said(tmp_path, text, words, read):
    path = tmp_path / "none.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpoError, match=rf"none\.csv. .*{words}"):
        read(path)
    assert not path.with_suffix(".png").exists()
