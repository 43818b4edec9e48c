"""The nearest name, where one is near."""

from __future__ import annotations

from spo.errors import nearest


def test_the_nearest_of_the_choices_is_proposed():
    choices = ["learning_rate", "rank", "steps"]
    assert nearest("learning_rte", choices) == ', did you mean "learning_rate"?'
    assert nearest("Rank", (name for name in choices)) == ', did you mean "rank"?'


def test_nothing_is_proposed_where_nothing_is_near():
    assert nearest("xyz", ["learning_rate"]) == ""
    assert nearest("rank", []) == ""
