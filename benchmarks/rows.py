"""A CSV file that grows by one row at a time, so that a long benchmark goes on where it was stopped."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path


def rows_of(path: Path) -> list[dict[str, str]]:
    """What is there, [] without a file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_done(path: Path, key: Mapping[str, str]) -> bool:
    """Whether a row has all of these cells."""
    return any(all(row[name] == value for name, value in key.items()) for row in rows_of(path))


def add_row(path: Path, values: Mapping[str, object], began: float) -> None:
    """Add and print a row, with the CPU seconds since `began` (`time.process_time`)."""
    values = {**values, "cpu_seconds": time.process_time() - began}
    cells = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in values.items()}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(cells))
        if is_new:
            writer.writeheader()
        writer.writerow(cells)
    print(cells, flush=True)
