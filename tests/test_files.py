"""Files are written whole or not at all, and never over another one by accident."""

from __future__ import annotations

import os

import pytest

from spo.errors import SpoError
from spo.files import exists_already, named_when_whole, write_text, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_utf_8_with_its_newlines(tmp_path):
    write_text(tmp_path / "a.txt", "Füße\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == b"F\xc3\xbc\xc3\x9fe\r\n\n"
    assert names(tmp_path) == ["a.txt"]


def test_the_former_file_stays_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "former")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        write_whole(path, fail)
    assert path.read_text() == "former"
    assert names(tmp_path) == ["a.txt"]


def test_the_name_is_given_when_the_file_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with named_when_whole(path, replace=True) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_made_meanwhile_by_another_stays(tmp_path, monkeypatch, hard_links):
    def refuse(*arguments, **keywords):
        raise OSError("no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a.txt"
    with named_when_whole(path, replace=False) as temporary:
        temporary.write_text("first")
    assert path.read_text() == "first"
    with pytest.raises(SpoError, match="exists already"), named_when_whole(path, replace=False) as temporary:
        temporary.write_text("second")
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_name_that_was_claimed_is_free_again_when_the_move_fails(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError("not here")

    path = tmp_path / "a.txt"
    with pytest.raises(PermissionError), named_when_whole(path, replace=False) as temporary:
        temporary.write_text("text")
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(os, "replace", refuse)
    assert names(tmp_path) == []


def test_what_is_said_of_a_taken_name(tmp_path):
    assert str(exists_already(tmp_path / "a")).endswith(
        'a" exists already; choose another name, or allow it to be replaced.'
    )
