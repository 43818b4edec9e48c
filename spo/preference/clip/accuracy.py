"""Accuracy of a preference model by timestep: a table, and curves over training."""

from __future__ import annotations

import csv
from pathlib import Path

from spo.errors import SpoError
from spo.files import write_whole
from spo.report.tables import table


def accuracy_table(path: Path, *, markdown: bool = False) -> str:
    """A run's accuracy.csv as a table: one row a measurement, one column a timestep. SpoError when there is none."""
    rows, timesteps = _read(path)
    table_rows = [[int(row["batch"]), *(float(row[t]) for t in timesteps)] for row in rows]
    return table(table_rows, ["update", *(f"t = {t}" for t in timesteps)], markdown=markdown)


def accuracy_curves(path: Path, png_path: Path) -> None:
    """Draw a run's accuracy.csv: over updates, one line a timestep; and first and last measurement over timesteps."""
    from matplotlib.figure import Figure

    rows, timesteps = _read(path)
    figure = Figure(figsize=(11, 4.2), dpi=110, facecolor="white", layout="constrained")
    over_updates, over_time = figure.subplots(1, 2)
    updates = [int(row["batch"]) for row in rows]
    for number, t in enumerate(timesteps):
        shade = (0.1, 0.25 + 0.6 * number / max(1, len(timesteps) - 1), 0.75 - 0.5 * number / max(1, len(timesteps)))
        over_updates.plot(updates, [float(row[t]) for row in rows], marker="o", color=shade, label=f"t = {t}")
    measurements = [(rows[0], "0.6", "first"), (rows[-1], "0.1", "last")]
    for row, colour, name in measurements[-1:] if len(rows) == 1 else measurements:
        shares = [float(row[t]) for t in timesteps]
        label = f"{name}, update {row['batch']}"
        over_time.plot([int(t) for t in timesteps], shares, marker="o", color=colour, label=label)
    for axes, label in ((over_updates, "update"), (over_time, "timestep")):
        axes.axhline(0.5, color="0.8", linewidth=1, zorder=0)
        axes.set(xlabel=label, ylabel=f"accuracy on {rows[-1]['pairs']} held-out pairs")
        axes.legend(frameon=False)
    write_whole(png_path, lambda temporary: figure.savefig(temporary, format="png"))


def _read(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise SpoError(f'"{path}" cannot be read ({error.strerror or error}).') from error
    if not rows:
        raise SpoError(f'"{path}" holds no measurement: no pair was held out.')
    return rows, [name for name in rows[0] if name.isdigit()]
