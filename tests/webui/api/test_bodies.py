"""Bodies of requests: what is JSON here, what a setting may be, and sentences for what is refused."""

from __future__ import annotations

import pytest

pydantic = pytest.importorskip("pydantic")

from spo.config import settings  # noqa: E402
from spo.webui.api import bodies  # noqa: E402
from spo.webui.jobs.training import HOST_OWNED  # noqa: E402


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b'{"a": 1, "a": 2}', 'the key "a" is there twice'),
        (b'{"%s": 1}' % (b"k" * 101), "longer than 100 characters"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 9 + b"]" * 9, "deeper than 8 levels"),
        (b"[" * 100_000, "deeper than 8 levels"),
    ],
)
def test_what_is_no_json_here(text, words):
    with pytest.raises(bodies.NotJSONError, match=words):
        bodies.read_json(text)


def test_json_is_read_as_it_stands():
    assert bodies.read_json('{"a": [1, 2.5, "ü", null]}'.encode()) == {"a": [1, 2.5, "ü", None]}
    assert bodies.read_json(b"[" * 8 + b"]" * 8) == [[[[[[[[]]]]]]]]


@pytest.mark.parametrize(
    ("model", "body", "words"),
    [
        (bodies.Stop, [], "The body is a list; it must be a JSON object."),
        (bodies.Stop, {"how": "soon"}, 'how is "soon"; accepted are save and now.'),
        (bodies.Start, {}, "name is missing; the LoRA's name"),
        (bodies.Start, {"name": 7}, "name is 7; it must be a text."),
        (bodies.Start, {"name": "x", "prompts": "a fox"}, 'prompts is "a fox"; it must be a list, each a text.'),
        (bodies.Start, {"name": "x", "resume": 1}, "resume is 1; it must be true or false."),
        (bodies.Start, {"name": "x", "settings": []}, "settings is a list; it must be an object of"),
        (bodies.Start, {"name": "x", "promts": []}, '"promts" is not known'),
        (bodies.Compare, {"prompts": [], "loras": [], "steps": True}, "steps is true; it must be a whole number."),
        (
            bodies.Compare,
            {"prompts": [], "loras": [], "weights": ["1"]},
            "weights is a list; it must be a list, each a",
        ),
    ],
)
def test_a_refusal_says_what_is_accepted(model, body, words):
    with pytest.raises((pydantic.ValidationError, TypeError)) as caught:
        model(**body) if isinstance(body, dict) else model(*body, how=body)
    assert bodies.sentence(caught.value.errors()[0], body, model).startswith(words)


def test_settings_are_those_of_the_configuration_but_the_webuis_own():
    described = bodies.settings_schema()
    assert set(described) == set(settings()) - set(HOST_OWNED)
    for name, one in described.items():
        setting = settings()[name]
        assert one["description"] == setting.help
        assert one.get("enum", []) == list(setting.choices)
        assert (one.get("minimum"), one.get("maximum")) == (setting.low, setting.high)
    start = bodies.schema(bodies.Start)["properties"]["settings"]
    assert set(start["properties"]) == set(described) and start["additionalProperties"] is False


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"), ({}, "an object"), (False, "false"), (10**40, "a number of more than 40 digits"), (1.5, "1.5"),
        ("x" * 81, f'"{"x" * 77}..."'),
    ],
)  # fmt: skip
def test_values_in_a_sentence_are_short(value, words):
    assert bodies.in_words(value) == words
