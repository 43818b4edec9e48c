"""Grids by what can be seen in them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from spo.report.grids import _font, _wrapped, grid
from tests.report.pixels import box_of, pixels_of

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def square(colour, side=64, height=None):
    return Image.new("RGB", (side, height or side), colour)


def test_small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_reduced():
    for side, shown in ((64, 256), (100, 200), (300, 300), (1024, 512)):
        assert pixels_of(grid([[square(RED, side)]], [""], [""]), RED) == shown**2
    assert pixels_of(grid([[square(RED, 200)]], [""], [""], cell_px=100), RED) == 100**2
    assert pixels_of(grid([[square(RED, 1024, 256)]], [""], [""]), RED) == 512 * 128


def test_pictures_lie_in_rows_and_columns():
    sheet = grid([[square(RED), square(GREEN)], [square(BLUE), None]], ["one", "two"], ["left", "right"])
    assert sheet.mode == "RGB"
    red, green, blue = (box_of(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert (red[1], red[3]) == (green[1], green[3]) and red[2] < green[0]
    assert (red[0], red[2]) == (blue[0], blue[2]) and red[3] < blue[1]
    assert {pixels_of(sheet, colour) for colour in (RED, GREEN, BLUE)} == {256**2}


LONG = "a photograph of " + "an elaborate gilded clockwork, " * 30
WORD = "W" * 400


@pytest.mark.parametrize("long", [LONG, WORD])
@pytest.mark.parametrize("where", ["row", "column", "caption", "title"])
def test_long_texts_make_the_sheet_grow_and_cover_nothing(where, long):
    def sheet_with(text):
        rows = [[square(RED), square(GREEN)]]
        texts = {"row": "r", "column": "c", "caption": "p", "title": "t"} | {where: text}
        captions = [[texts["caption"], "p"]]
        return grid(rows, [texts["row"]], [texts["column"], "c"], captions, title=texts["title"])

    short, grown = sheet_with("x"), sheet_with(long)
    assert grown.height > short.height + 100
    assert grown.width < short.width + 300
    assert pixels_of(grown, RED) == pixels_of(grown, GREEN) == 256**2
    array = np.asarray(grown)
    for border in (array[:20], array[-20:], array[:, :20], array[:, -20:]):
        assert (border == 255).all()


def test_wrapping_loses_no_letter():
    font = _font(15)
    for text in (LONG, WORD, "a\n\nb", "  x  ", ""):
        lines = _wrapped(text, font, 120)
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert all(font.getlength(line) <= 120 for line in lines)
    assert _wrapped("two words", font, 1000) == ["two words"]
    assert _wrapped("two\nlines", font, 1000) == ["two", "lines"]


def test_captions_are_written_under_their_picture():
    plain = grid([[square(RED), square(GREEN)]], [""], ["", ""])
    marked = grid([[square(RED), square(GREEN)]], [""], ["", ""], [["", "22.51"]])
    array = np.asarray(marked)[box_of(marked, GREEN)[3] :]
    ink = np.nonzero((array < 200).any(-1))[1]
    left, _, right, _ = box_of(marked, GREEN)
    assert marked.height > plain.height
    assert len(ink) > 30 and ink.min() > left and ink.max() < right
    assert abs((ink.min() + ink.max()) / 2 - (left + right) / 2) < 3


def test_transparent_and_grey_pictures():
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert pixels_of(grid([[clear]], [""], [""]), RED) == 0
    assert pixels_of(grid([[Image.new("L", (64, 64), 7)]], [""], [""]), (7, 7, 7)) == 256**2


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels", "captions"),
    [
        ([], [], [], None),
        ([[square(RED)]], [], ["a"], None),
        ([[square(RED)]], ["a"], ["a", "b"], None),
        ([[square(RED)]], ["a"], ["a"], [["1", "2"]]),
    ],
)
def test_labels_must_match(rows, row_labels, column_labels, captions):
    with pytest.raises(ValueError, match="labels|captions"):
        grid(rows, row_labels, column_labels, captions)
