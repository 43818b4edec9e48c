"""Tables, letter by letter."""

from __future__ import annotations

import pytest

from spo.report.tables import score_table, table

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


def test_score_table_of_a_comparison_that_was_stopped():
    text = score_table({"base": [1.0, 2.0, 3.0], "a : 1": [2.0, 3.0, None], "b : 1": [None] * 3}, "taste")
    lines = text.splitlines()
    assert lines[0].split("  ")[-1] == "wins against base (95 %)" and "mean score (taste)" in lines[0]
    assert lines[2].split() == ["base", "2.000", "-"]
    assert lines[3].split()[:5] == ["a", ":", "1", "2.500", "100%"]
    assert lines[4].split() == ["b", ":", "1", "-", "-"]
