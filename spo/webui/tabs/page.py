"""What the tab shows of a job, as HTML: message, pool, curves, samples. All text is escaped; no scripts."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spo.webui.jobs.job import Job, PoolPictures

if TYPE_CHECKING:
    from PIL.Image import Image

_NAMES = {
    "waiting": "Waiting",
    "loading": "Loading",
    "working": "Working",
    "stopping": "Stopping",
    "finished": "Finished",
    "stopped": "Stopped",
    "failed": "Failed",
}
_CHART_PX = (300, 120)
_MARGIN_PX = (44, 14, 8, 20)  # left, top, right, bottom


def status(job: Job | None) -> str:
    """The whole status area. Attributes on its root tell the page's script what to follow."""
    if job is None:
        return '<div class="spo-status" data-phase="none"><p class="spo-message">Nothing is going on.</p></div>'
    lora = job.output.stem if job.output is not None else ""
    parts = [
        f'<div class="spo-status" data-phase="{job.shown_phase}" data-task="{html.escape(job.task)}" '
        f'data-kind="{job.kind}" data-version="{job.version}" data-live="{int(job.live)}" '
        f'data-lora="{html.escape(lora)}" role="status" '
        'aria-live="polite">',
        f'<p class="spo-message spo-{job.shown_phase}"><b>{_NAMES[job.shown_phase]}: {html.escape(job.name)}.</b> '
        f"{html.escape(job.message)}</p>",
    ]
    if job.kind == "download" and job.live:
        parts.append(f'<progress max="1" value="{job.fraction:.4f}"></progress>')
    if job.pool is not None:
        parts.append(_pool(job.pool))
    if job.rows:
        parts.append(curves(job.rows))
    if job.picture is not None and job.picture.exists():
        title = "Samples" if job.kind == "training" else "Comparison"
        parts.append(f'<div class="spo-samples"><h4>{title}</h4>{_file(job.picture)}</div>')
    if job.table:
        parts.append(f'<pre class="spo-table">{html.escape(job.table)}</pre>')
    if job.log:
        lines = html.escape("\n".join(job.log))
        parts.append(f'<details class="spo-log"><summary>Log</summary><pre>{lines}</pre></details>')
    return "".join(parts) + "</div>"


def curves(rows: Sequence[Mapping[str, float]]) -> str:
    """Preference score, kept pairs and density ratios over the updates, as three small charts."""
    steps = [row.get("step", 0.0) for row in rows]

    def series(name: str) -> list[float]:
        return [row.get(name, math.nan) for row in rows]

    charts = [
        chart("Preference score", steps, {"mean": series("preference_mean")}),
        chart("Kept pairs, share", steps, {"kept": series("kept_share")}, low=0.0, high=1.0),
        chart("Density ratios", steps, {"best": series("ratio_win"), "worst": series("ratio_lose")}),
    ]
    return f'<div class="spo-curves">{"".join(charts)}</div>'


def chart(
    title: str,
    xs: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    low: float | None = None,
    high: float | None = None,
) -> str:
    """One line chart as SVG, in the text's colour, so that it suits every theme. Values that are NaN are left out.

    low, high  ends of the vertical axis; None: those of the values
    """
    width, height = _CHART_PX
    left, top, right, bottom = _MARGIN_PX
    values = [value for line in lines.values() for value in line if math.isfinite(value)]
    low = (min(values) if values else 0.0) if low is None else low
    high = (max(values) if values else 1.0) if high is None else high
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)
    first, last = (min(xs), max(xs)) if xs else (0.0, 1.0)
    last = last if last > first else first + 1

    def place(x: float, y: float) -> str:
        return (
            f"{left + (x - first) / (last - first) * (width - left - right):.1f},"
            f"{height - bottom - (y - low) / (high - low) * (height - top - bottom):.1f}"
        )

    drawn = []
    for number, (label, line) in enumerate(lines.items()):
        points = [place(x, y) for x, y in zip(xs, line, strict=True) if math.isfinite(y)]
        name = html.escape(label)
        if len(points) == 1:
            x, y = points[0].split(",")
            drawn.append(f'<circle class="spo-line{number}" cx="{x}" cy="{y}" r="2"><title>{name}</title></circle>')
        drawn.append(f'<polyline class="spo-line{number}" points="{" ".join(points)}"><title>{name}</title></polyline>')
        if len(lines) > 1:
            start = width - right - 44 * (len(lines) - number) + 4
            drawn.append(f'<text class="spo-line{number}" x="{start}" y="11">{name}</text>')
    base = height - bottom
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)} from {low:.3g} to {high:.3g}">'
        f'<path class="spo-axis" d="M{left},{top} V{base} H{width - right}"/>'
        f'<text x="{left - 4}" y="{top + 4}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{left - 4}" y="{base}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{left}" y="{height - 6}">{first:g}</text>'
        f'<text x="{width - right}" y="{height - 6}" text-anchor="end">update {last:g}</text>'
        f"{''.join(drawn)}</svg></figure>"
    )


def _pool(pool: PoolPictures) -> str:
    cells = []
    for number, (picture, score) in enumerate(zip(pool.pictures, pool.scores, strict=True)):
        marks = [
            word
            for word, is_it in (
                ("best", number == pool.win),
                ("worst", number == pool.lose),
                ("goes on", number == pool.parent),
            )
            if is_it
        ]
        classes = " ".join(f"spo-{mark.replace(' ', '-')}" for mark in marks)
        cells.append(
            f'<figure class="{classes}"><img alt="candidate {number + 1}: {", ".join(marks) or "neither"}" '
            f'src="{uri(picture)}"><figcaption>{score:.2f}<span>{" · ".join(marks)}</span></figcaption></figure>'
        )
    verdict = "kept as a pair" if pool.kept else "too close, not kept"
    return (
        f'<div class="spo-pool"><h4>Pool at step {pool.step + 1}, timestep {pool.timestep}: {verdict}</h4>'
        f'<div class="spo-row">{"".join(cells)}</div><p>{html.escape(pool.prompt)}</p></div>'
    )


def uri(picture: Image) -> str:
    """A picture as a data URI (JPEG)."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _file(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        picture.thumbnail((1400, 1400))
        return f'<img alt="{html.escape(path.stem)}" src="{uri(picture)}">'


def pictures(paths: Sequence[Path]) -> str:
    """Pictures one below the other."""
    return f'<div class="spo-samples">{"".join(_file(path) for path in paths)}</div>'


def row(paths: Sequence[Path]) -> str:
    """Pictures side by side."""
    return f'<div class="spo-row spo-vote">{"".join(_file(path) for path in paths)}</div>'


def error(text: str) -> str:
    """One sentence that the user must not miss."""
    return f'<p class="spo-message spo-failed" role="alert">{html.escape(text)}</p>'


def small(text: str) -> str:
    """A remark under a field."""
    return f'<p class="spo-small">{html.escape(text)}</p>'


def note(text: str) -> str:
    """Lines of plain text as they are."""
    return f'<pre class="spo-plan">{html.escape(text)}</pre>'
