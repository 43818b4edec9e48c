"""Prompts from a file: text, JSON, JSON lines or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spo.errors import SpoError

FIELDS = ("caption", "prompt", "text")  # the official 4k file has "caption"


def read_prompts(path: str | Path) -> list[str]:
    """The file's prompts in order, stripped, empty ones left out.

    .txt   one a line
    .json  a list of texts, or of objects with a "caption", "prompt" or "text"; or an object that holds such a list
    .jsonl the same, one a line
    .csv   a column of one of these names

    Raises SpoError when it cannot be read, has another ending, holds something else, or has no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SpoError(f'prompts file "{path}" cannot be read: {error.strerror or error}.') from error
    except UnicodeDecodeError as error:
        raise SpoError(f'prompts file "{path}" is not UTF-8 text.') from error
    kind = path.suffix.lower()
    if kind == ".txt":
        texts: Iterable[Any] = text.splitlines()
    elif kind == ".json":
        texts = _json_prompts(_parse(text, path), path)
    elif kind == ".jsonl":
        rows = [_parse(line, path, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        texts = _json_prompts(rows, path)
    elif kind == ".csv":
        texts = _csv_prompts(text, path)
    else:
        raise SpoError(f'prompts file "{path}" ends in "{path.suffix}"; accepted are .txt, .json, .jsonl and .csv.')
    prompts = [prompt.strip() for prompt in texts if prompt.strip()]
    if not prompts:
        raise SpoError(f'prompts file "{path}" has no prompt in it.')
    return prompts


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        where = f" line {line}" if line else ""
        raise SpoError(f'prompts file "{path}"{where} is not valid JSON: {error}.') from error


def _json_prompts(value: Any, path: Path) -> list[str]:
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise SpoError(f'prompts file "{path}" must hold a list of prompts.')
    prompts = []
    for number, row in enumerate(value, 1):
        prompt = next((row[name] for name in FIELDS if name in row), None) if isinstance(row, dict) else row
        if not isinstance(prompt, str):
            raise SpoError(
                f'prompts file "{path}", entry {number}: neither a text nor an object with {" / ".join(FIELDS)}.'
            )
        prompts.append(prompt)
    return prompts


def _csv_prompts(text: str, path: Path) -> list[str]:
    reader = csv.DictReader(io.StringIO(text))
    columns = {name.strip().lower(): name for name in reader.fieldnames or []}
    column = next((columns[name] for name in FIELDS if name in columns), None)
    if column is None:
        raise SpoError(f'prompts file "{path}" has no column {" / ".join(FIELDS)}; its columns are {list(columns)}.')
    return [row[column] or "" for row in reader]
