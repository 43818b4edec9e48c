"""Tables of text, aligned or in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spo.report.win_rate import win_rate


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], *, markdown: bool = False) -> str:
    """Rows under headers as aligned text, or as a Markdown table; columns of numbers stand to the right.

    Floats have 4 significant digits, None as a dash. Raises ValueError for a row of another length.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers: {list(row)}")
    lines = [[_cell(value, markdown) for value in line] for line in [headers, *rows]]
    numeric = [
        bool(rows) and all(value is None or isinstance(value, int | float) for value in column)
        for column in ([row[i] for row in rows] for i in range(len(headers)))
    ]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(headers))]
    layout = [f"{'>' if right else '<'}{width}" for right, width in zip(numeric, widths, strict=True)]
    aligned = [[format(text, how) for text, how in zip(line, layout, strict=True)] for line in lines]
    if markdown:
        rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
        return "\n".join(f"| {' | '.join(line)} |" for line in [aligned[0], rule, *aligned[1:]])
    rule = ["-" * width for width in widths]
    return "\n".join("  ".join(line).rstrip() for line in [aligned[0], rule, *aligned[1:]])


def score_table(columns: Mapping[str, Sequence[float | None]], scorer: str) -> str:
    """Mean score of each column, and how often it wins against the first one, row by row.

    columns  label -> scores, all as many; None where there is no picture, which counts for nothing
    """
    base = next(iter(columns.values()))
    rows: list[list[str]] = []
    for number, (label, scores) in enumerate(columns.items()):
        known = [score for score in scores if score is not None]
        mean = f"{sum(known) / len(known):.3f}" if known else "-"
        pairs = [(a, b) for a, b in zip(scores, base, strict=True) if a is not None and b is not None]
        against = "-"
        if number and pairs:
            rate = win_rate([a for a, _ in pairs], [b for _, b in pairs])
            against = f"{rate.rate:.0%} ({rate.low:.0%} to {rate.high:.0%})"
        rows.append([label, mean, against])
    return table(rows, ["", f"mean score ({scorer})", "wins against base (95 %)"])


def _cell(value: object, markdown: bool) -> str:
    text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return text.replace("\\", "\\\\").replace("|", "\\|") if markdown else text
