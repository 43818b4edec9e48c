"""Win rates against published and hand-derived intervals; grids, tables and curves by what can be seen in them."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from PIL import Image

from spo.errors import SpoError
from spo.report.compare import _ends, _font, _running_mean, _wrapped, curves, grid, table, win_rate

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
FIRST_RUN, SECOND_RUN = (0x25, 0x63, 0xEB), (0xE8, 0x59, 0x0C)


def pixels_of(image, colour):
    return int((np.asarray(image.convert("RGB")) == colour).all(-1).sum())


def box_of(image, colour):
    """left, top, right, bottom of the pixels of a colour, the last two exclusive."""
    y, x = np.nonzero((np.asarray(image) == colour).all(-1))
    return x.min(), y.min(), x.max() + 1, y.max() + 1


# ---- win rate


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_as_newcombe_published(wins, count, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (Wilson's score interval)."""
    result = win_rate([1.0] * count, [0.0] * wins + [2.0] * (count - wins))
    assert (result.wins, result.ties, result.losses) == (wins, 0, count - wins)
    assert result.low == pytest.approx(low, abs=5e-5)
    assert result.high == pytest.approx(high, abs=5e-5)


def test_ties_count_half():
    """At rate 1/2 the interval is 1/2 +- z / (2 sqrt(n + z^2)); with z^2 = 3.8415 and n = 10 that is 0.2634."""
    for a in ([1.0] * 10, [1.0, 3.0] * 5, [1.0, 3.0, 2.0, 2.0, 2.0] * 2):
        b = [1.0] * 10 if a == [1.0] * 10 else [2.0] * 10
        result = win_rate(a, b)
        assert result.rate == 0.5
        assert result.low == pytest.approx(0.2366, abs=5e-5)
        assert result.high == pytest.approx(0.7634, abs=5e-5)
    assert (result.wins, result.ties, result.losses) == (2, 6, 2)
    assert win_rate([3, 2], [1, 2]).rate == 0.75


def test_scores_are_paired_and_can_be_arrays():
    a, b = np.array([1.0, 5.0, 2.0]), np.array([2.0, 4.0, 1.0])
    assert win_rate(a, b).wins == 2 and win_rate(b, a).wins == 1
    assert win_rate(b, a[[2, 0, 1]]).wins == 1
    assert win_rate(a, b).low == pytest.approx(1 - win_rate(b, a).high)
    assert win_rate(a, b).text().startswith("67% (21% - 94%), 2 won, 0 tied, 1 lost")


def test_what_has_no_win_rate():
    with pytest.raises(SpoError, match="at least one pair"):
        win_rate([], [])
    with pytest.raises(SpoError, match="not finite"):
        win_rate([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="2 scores against 1"):
        win_rate([1.0, 2.0], [1.0])


# ---- tables

ROWS = [["base", 0.123456, 3, None], ["a | b\nc", 12.5, 100, "ok"]]


def test_plain_table():
    assert table(ROWS, ["name", "score", "n", "note"]).splitlines() == [
        "name      score    n  note",
        "-------  ------  ---  ----",
        "base     0.1235    3  -",
        "a | b c    12.5  100  ok",
    ]


def test_markdown_table():
    assert table(ROWS, ["name", "score", "n", "note"], markdown=True).splitlines() == [
        r"| name     |  score |   n | note |",
        r"| -------- | -----: | --: | ---- |",
        r"| base     | 0.1235 |   3 | -    |",
        r"| a \| b c |   12.5 | 100 | ok   |",
    ]


def test_tables_without_rows_and_with_wrong_ones():
    assert table([], ["a", "b"]).splitlines() == ["a    b", "---  ---"]
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        table([["x"]], ["a", "b"])


# ---- grids


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


# ---- curves


def test_running_mean_by_hand():
    """50 rows: two on each side are averaged, fewer at the ends; NaN counts nowhere."""
    values = np.arange(50.0)
    values[10] = np.nan
    smooth = _running_mean(values)
    assert smooth[:3].tolist() == [1.0, 1.5, 2.0]
    assert smooth[10] == (8 + 9 + 11 + 12) / 4
    assert smooth[11] == (9 + 11 + 12 + 13) / 4
    assert smooth[-1] == 48.0
    assert np.isnan(_running_mean(np.full(50, np.nan))).all()
    assert _running_mean(np.array([3.0, np.nan, 5.0]))[[0, 2]].tolist() == [3.0, 5.0]


def test_ends_are_means_of_a_tenth():
    values = np.concatenate([[np.nan], np.arange(20.0)])
    assert _ends(values) == (0.5, 18.5)
    assert _ends(np.array([4.0])) == (4.0, 4.0)
    assert all(math.isnan(value) for value in _ends(np.array([])))


def write_metrics(path, count, start=3.0):
    names = "step,epoch,preference_mean,kept_share,loss,ratio_win,ratio_lose,ratio_clamped_share,gradient_norm,"
    names += "learning_rate,pairs_per_s,images_per_s,preference_t701,preference_t1"
    middle = "0.6,0.69,1.01,0.99,0.02,0.1,6e-05,8.1,1.2"
    rows = [f"{8 * i},0,{start + i / 50},{middle},{2 + i / 60},{4 + i / 40}" for i in range(count)]
    path.write_text("\n".join([names, *rows]) + "\n")
    return path


def drawn(source, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        curves(source, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


def test_curves_of_a_run(tmp_path):
    image = drawn(write_metrics(tmp_path / "metrics.csv", 60), tmp_path / "curves.png")
    assert image.size == (1760, 1100)
    assert pixels_of(image, FIRST_RUN) > 2000
    assert 200 < pixels_of(image, SECOND_RUN) < pixels_of(image, FIRST_RUN)  # the losers' ratio alone
    upper_left = image.crop((0, 100, 1020, 500))
    left, top, right, bottom = box_of(upper_left, FIRST_RUN)
    assert right - left > 800 and bottom - top > 250  # the mean score fills the largest panel


def test_curves_of_several_runs(tmp_path):
    runs = {"short": write_metrics(tmp_path / "a.csv", 20), "long": write_metrics(tmp_path / "b.csv", 60, 2.0)}
    image = drawn(runs, tmp_path / "curves.png")
    largest = image.crop((500, 160, 1020, 490))  # its right half, below the legend
    assert pixels_of(largest, FIRST_RUN) == 0
    assert pixels_of(largest, SECOND_RUN) > 500


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("", False),
        ("step,loss\n", False),
        ("step,loss\n1,nan\n2,\n3,inf\n", False),
        ("step,loss\n1,0.69\n", True),
        ("loss\n0.69\n0.68\n0.68\n", True),
        ("step,preference_mean,loss\n1,5.5,0.69\n2,none,\n3,6.5,0.68\n4,6.", True),
        ("step,preference_mean,preference_t1,preference_t51\n4,5,,\n4,6,1,\n4,7,2,\n", True),
        ("step,preference_mean,preference_tail\n,5,1\n,6,2\n", True),
        ("step,learning_rate,gradient_norm\n1,0,0\n2,0,0\n3,0,0\n", True),
        ("step,loss\n1,0.69,7,8\n2\n\n3,0.68\n", True),
    ],
    ids=["empty", "no rows", "not finite", "one row", "no step", "cut off", "steps stay", "names", "zeros", "ragged"],
)
def test_odd_metrics_are_drawn(tmp_path, text, visible):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    alone = drawn(path, tmp_path / "alone.png")
    assert pixels_of(alone, (255, 255, 255)) < 0.995 * alone.width * alone.height
    assert (pixels_of(alone, FIRST_RUN) > 20) == visible
    other = write_metrics(tmp_path / "other.csv", 40)
    assert pixels_of(drawn({"odd": path, "whole": other}, tmp_path / "both.png"), SECOND_RUN) > 2000


def test_missing_metrics(tmp_path):
    with pytest.raises(SpoError, match=r'there is no ".*metrics\.csv"'):
        curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []
