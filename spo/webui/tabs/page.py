"""What the tab shows of a job, as HTML: message, pool, curves, samples. All text is escaped; no scripts."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.errors import SpoError
from spo.webui import folders
from spo.webui.jobs.job import Job, PoolPictures, StatisticsTable
from spo.webui.jobs.probe import words
from spo.webui.seam import webui

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
WORDS = (  # shown later, when there is work
    *_NAMES.values(),
    "Nothing is going on.",
    "Samples",
    "Comparison",
    "best",
    "worst",
    "goes on",
    "Open the page with all pictures",
)
HIDDEN = {  # pressed and filled by the page's script
    "spo_refresh", "spo_lists", "spo_hello", "spo_filled", "spo_seen",
    "spo_vote_refresh", "spo_vote_choose", "spo_vote_change",
}  # fmt: skip
_CHECK_CHARTS = {  # column of validation.csv -> title
    "judge": "Held-out judge",
    "adherence": "Adherence to prompts",
    "diversity": "Diversity between seeds",
}
_CHART_PX = (300, 120)
_MARGIN_PX = (44, 14, 8, 20)  # left, top, right, bottom
PARTS = ("pool", "curves", "pictures", "table", "log")


def status(job: Job | None, run: Job | None = None, line: Sequence[str] = (), **more: Any) -> str:
    """What is going on, in a line. Attributes on its root tell the page's script what to follow.

    line  names of what begins afterwards
    run   the last training run, whose LoRA is sent to txt2img; more: other attributes
    """
    values: dict[str, Any] = {"phase": "none", "live": 0, **more}
    text = '<p class="spo-message">Nothing is going on.</p>'
    if job is not None:
        values |= {"phase": job.shown_phase, "task": job.task, "kind": job.kind, "live": int(job.live)}
        text = _message(job)
    if line:
        text += small(f"Then: {', '.join(line)}.")
    if run is not None and run.output is not None and run.example is not None:
        values |= {
            "lora": run.output.stem,
            "prompt": run.example.prompts[0],
            "negative": run.example.negative_prompt,
            "width": run.example.width,
            "height": run.example.height,
            "steps": run.example.sampling_steps,
            "cfg": f"{run.example.guidance_scale:g}",
        }
    return f'<div class="spo-status" {_attributes(values)} role="status">{text}</div>'


def _attributes(values: Mapping[str, Any]) -> str:
    return " ".join(f'data-{name}="{html.escape(str(value))}"' for name, value in values.items())


def _message(job: Job) -> str:
    left = f" {words(job.eta_s)} left." if job.live and job.eta_s else ""
    return (
        f'<p class="spo-message spo-{job.shown_phase}"><b>{_NAMES[job.shown_phase]}</b> <b>{html.escape(job.name)}</b> '
        f"<span>{html.escape(folders.placeless(job.message))}{left}</span></p>"
    )


def download(job: Job | None) -> str:
    """A download's line and bar; "" when there was none."""
    if job is None:
        return ""
    bar = f'<progress max="1" value="{job.fraction:.4f}" aria-label="Download"></progress>' if job.live else ""
    return f'<div class="spo-download" role="status" data-live="{int(job.live)}">{_message(job)}{bar}</div>'


def part_keys(job: Job | None) -> dict[str, str]:
    """Part of a job's page -> what changes whenever that part does; "" where there is nothing to show."""
    if job is None:
        return dict.fromkeys(PARTS, "")
    picture = job.picture if job.picture is not None and job.picture.exists() else None
    keys = {
        "pool": f"{job.pool.made_s}" if job.pool is not None else "",
        "curves": f"{len(job.rows)} {len(job.checks)}" if job.rows or job.checks else "",
        "pictures": f"{picture.name} {picture.stat().st_mtime_ns}" if picture is not None else "",
        "table": f"{len(job.table)} {job.statistics is not None}" if job.table or job.statistics else "",
        "log": f"{len(job.log)} {job.log[-1]}" if job.log else "",
    }
    return {part: f"{job.task} {key}" if key else "" for part, key in keys.items()}


_made: dict[tuple[str, str], tuple[str, str]] = {}  # kind and part -> key and HTML, made once for all pages


def part(name: str, job: Job, key: str) -> str:
    """One of `PARTS` as HTML; the same key gives the same text without making it again."""
    known = _made.get((job.kind, name))
    if known is None or known[0] != key:
        known = _made[job.kind, name] = key, _part(name, job)
    return known[1]


def _statistics(table: StatisticsTable) -> str:
    """An interval stands in a line of its own, under its mean."""
    lines = []
    for name, cells in table.rows:
        shown = (
            f"<td>{html.escape(mean)}{f'<small>{html.escape(ends)}</small>' if ends else ''}</td>"
            for mean, ends in cells
        )
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{"".join(shown)}</tr>')
    heads = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in ("", *table.columns))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _part(name: str, job: Job) -> str:
    if name == "pool" and job.pool is not None:
        return _pool(job.pool)
    if name == "curves":
        return curves(job.rows, job.checks)
    if name == "pictures" and job.picture is not None:
        title = "Samples" if job.kind == "training" else "Comparison"
        shown = [_file(path) for path in (job.first_samples, job.picture) if path is not None and path.exists()]
        return f'<div class="spo-samples"><h4>{title}</h4>{"".join(shown)}</div>'
    if name == "table":
        text = _statistics(job.statistics) if job.statistics else f"<pre>{html.escape(job.table)}</pre>"
        return f'<div class="spo-table" tabindex="0">{text}</div>{_page_of(job)}'
    if name == "log":
        lines = html.escape(folders.placeless("\n".join(job.log)))
        return f'<pre class="spo-log" tabindex="0">{lines}</pre>'
    return ""


def _page_of(job: Job) -> str:
    """Where a comparison's page with its pictures is: a link where the WebUI serves the file, else its path."""
    if job.page is None:
        return ""
    link, path = webui.link_to(job.page), html.escape(folders.placeless(str(job.page)))
    if not link:
        return f'<p class="spo-small">{path}</p>'
    address = html.escape(link)
    return (
        f'<p><a href="{address}" target="_blank" rel="noopener">Open the page with all pictures</a></p>'
        f'<p class="spo-small">{path}</p>'
    )


def curves(rows: Sequence[Mapping[str, float]], checks: Sequence[Mapping[str, float]] = ()) -> str:
    """Preference score, kept pairs and density ratios over the updates, as three small charts; and, where stages are
    judged, what was measured on held-out pictures.

    checks  rows of validation.csv
    """
    steps = [row.get("step", 0.0) for row in rows]

    def series(name: str) -> list[float]:
        return [row.get(name, math.nan) for row in rows]

    charts = [
        chart("Preference score", steps, {"mean": series("preference_mean")}),
        chart("Kept pairs, share", steps, {"kept": series("kept_share")}, low=0.0, high=1.0),
        chart("Density ratios", steps, {"best": series("ratio_win"), "worst": series("ratio_lose")}),
    ]
    checked = [row.get("step", 0.0) for row in checks]
    for name, title in _CHECK_CHARTS.items():
        values = [row.get(name, math.nan) for row in checks]
        if any(math.isfinite(value) for value in values):
            charts.append(chart(title, checked, {title: values}))
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
        f'<text x="{left - 4}" y="{top + 4}" text-anchor="end">{_short(high)}</text>'
        f'<text x="{left - 4}" y="{base}" text-anchor="end">{_short(low)}</text>'
        f'<text x="{left}" y="{height - 6}">{first:g}</text>'
        f'<text x="{width - right}" y="{height - 6}" text-anchor="end">update {last:g}</text>'
        f"{''.join(drawn)}</svg></figure>"
    )


def _short(value: float) -> str:
    """A number as wide as the margin allows: 101.4, 0.9487, 6e+14."""
    text = f"{value:.4g}"
    return text if len(text) <= 7 else f"{value:.0e}"


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
        name = f"candidate {number + 1}: {', '.join(marks) or 'neither'}"
        cells.append(
            f'<figure class="{classes}">{_button(picture, name)}'
            f"<figcaption>{score:.2f}<span>{' · '.join(marks)}</span></figcaption></figure>"
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


@lru_cache(maxsize=128)
def uri_of(path: Path, largest_px: int = 1024) -> str:
    """A picture's file as a data URI, made once; no larger than that."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.thumbnail((largest_px, largest_px))
        return uri(picture)


def zoom_button(path: Path, name: str) -> str:
    """A picture's file as a picture that can be looked at large."""
    return f'<button class="spo-zoom" type="button"><img alt="{name}, click for large" src="{uri_of(path)}"></button>'


def _button(picture: Image, name: str) -> str:
    """A picture that can be looked at large."""
    name = html.escape(name)
    return f'<button class="spo-zoom" type="button"><img alt="{name}, click for large" src="{uri(picture)}"></button>'


def _file(path: Path, largest_px: int = 1400) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        picture.thumbnail((largest_px, largest_px))
        return _button(picture, path.stem)


def pictures(paths: Sequence[Path]) -> str:
    """Pictures one below the other."""
    return f'<div class="spo-samples">{"".join(_file(path) for path in paths)}</div>'


def with_errors(work: Callable[..., str]) -> Callable[..., str]:
    """`work`, whose SpoError becomes its answer."""

    def answer(*given: Any) -> str:
        try:
            return work(*given)
        except SpoError as refusal:
            return error(str(refusal))

    return answer


def error(text: str) -> str:
    """One sentence that the user must not miss."""
    return f'<p class="spo-message spo-failed" role="alert">{html.escape(folders.placeless(text))}</p>'


def small(text: str) -> str:
    """A remark under a field."""
    return f'<p class="spo-small">{html.escape(text)}</p>'


def note(text: str) -> str:
    """Lines of plain text as they are."""
    return f'<pre class="spo-plan">{html.escape(folders.placeless(text))}</pre>'
