"""Prompts from every kind of file, the official one's layout too."""

from __future__ import annotations

import pytest

from spo.errors import SpoError
from spo.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a fox\n\n  a boat \n"),
        ("bom.txt", "\ufeffa fox\r\na boat\r\n"),
        ("a.json", '["a fox", "a boat"]'),
        ("official.json", '[{"caption": "a fox", "id": 1}, {"caption": "a boat"}]'),
        ("inside.json", '{"version": 1, "prompts": [{"prompt": "a fox"}, {"text": "a boat"}]}'),
        ("a.jsonl", '{"caption": "a fox"}\n\n"a boat"\n'),
        ("a.csv", 'id,Caption\n1,"a fox"\n2,a boat\n'),
    ],
)
def test_reads(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["a fox", "a boat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", b"\n \n", "has no prompt in it"),
        ("a.md", b"a", r'ends in ".md"'),
        ("a.json", b"{", "is not valid JSON"),
        ("a.json", b'{"a": 1}', "must hold a list"),
        ("a.json", b'["a", 3]', "entry 2"),
        ("a.jsonl", b'"a"\nx', "line 2 is not valid JSON"),
        ("a.csv", b"id,title\n1,a\n", "has no column caption / prompt / text"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_says_what_is_wrong(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SpoError, match=message):
        read_prompts(tmp_path / name)
