"""Comparing: labelled grids of pictures, win rates, a run's curves, tables of text.

Nothing here knows of models. Pillow, matplotlib and numpy are imported where they are used; figures are made without
pyplot, so that the WebUI's threads do not meet in its global state. All text is set in DejaVu Sans, which comes with
matplotlib and looks the same with every version of Pillow.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.errors import SpoError
from spo.files import write_whole

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

INK, MUTED, FAINT = "#1f2430", "#667085", "#e4e7ec"


# ---------------------------------------------------------------------------------------------- win rate


@dataclass(frozen=True)
class WinRate:
    """How often a beats b: counts, and the rate (0 ... 1, ties count half) with its 95 % Wilson interval."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float

    def text(self) -> str:
        """`62 % (54 - 69 %), 74 won, 3 tied, 44 lost`, the interval in brackets."""
        return (
            f"{self.rate:.0%} ({self.low:.0%} - {self.high:.0%}), {self.wins} won, {self.ties} tied, {self.losses} lost"
        )


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float]) -> WinRate:
    """How often a's score is above b's, pair by pair (the same prompt and seed in both).

    The interval is `wilson_interval`'s with p = (wins + ties/2)/n.
    Raises SpoError when there is no pair or a score is not finite, ValueError for different numbers of scores.
    """
    if len(scores_a) != len(scores_b):
        raise ValueError(f"{len(scores_a)} scores against {len(scores_b)}")
    pairs = [(float(a), float(b)) for a, b in zip(scores_a, scores_b, strict=True)]
    if not pairs:
        raise SpoError("A win rate needs at least one pair of scores; there is none.")
    if not all(math.isfinite(a) and math.isfinite(b) for a, b in pairs):
        raise SpoError("A score is not finite, so there is no win rate: score in float32.")
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    count, ties = len(pairs), len(pairs) - wins - losses
    rate = (wins + ties / 2) / count
    low, high = wilson_interval(rate, count)
    return WinRate(wins, ties, losses, rate, low, high)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """(low, high) of Wilson's 95 % interval for a share, 0 ... 1, of `count` (at least 1) things.

    Wilson (1927): (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    z = 1.959963984540054
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


# ---------------------------------------------------------------------------------------------- tables


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], *, markdown: bool = False) -> str:
    """Rows under headers as aligned text, or as a Markdown table; columns of numbers stand to the right.

    Floats are shown with 4 significant digits, None as a dash. Raises ValueError for a row of another length.
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


# ---------------------------------------------------------------------------------------------- grids


def grid(
    rows: Sequence[Sequence[Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    cell_px: int | None = None,
    title: str | None = None,
) -> Image:
    """A labelled grid of pictures, RGB on white; it grows with its texts, none of which is cut off.

    rows           pictures of any size and mode; None, or a short row, leaves a cell empty
    row_labels     one for each row; column_labels: one for each column; "" for none. Long ones are wrapped
    captions       a text under each picture, such as its score
    cell_px        longest side of a shown picture; default: the largest picture's, but 256 to 512. Smaller pictures are
                   enlarged by a whole factor, larger ones reduced

    Raises ValueError when labels or captions do not match the pictures.
    """
    from PIL import Image, ImageDraw

    columns = max((len(row) for row in rows), default=0)
    if not columns or len(row_labels) != len(rows) or len(column_labels) != columns:
        labels = f"{len(row_labels)} row labels, {len(column_labels)} column labels"
        raise ValueError(f"{len(rows)} rows of at most {columns} pictures, but {labels}")
    if captions is not None and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError("captions and pictures differ in number")
    pictures = [p for row in rows for p in row if p is not None]
    longest = max((max(picture.size) for picture in pictures), default=256)
    limit = cell_px or min(max(longest, 256), 512)
    shown = [[_shown(picture, limit) for picture in row] for row in rows]
    sizes = [picture.size for row in shown for picture in row if picture is not None] or [(limit, limit)]
    cell_width, cell_height = max(160, *(width for width, _ in sizes)), max(height for _, height in sizes)

    gap, margin = 12, 24
    plain, bold, large, small = _font(15), _font(15, bold=True), _font(22, bold=True), _font(14)
    body_width = columns * (cell_width + gap) - gap
    side = _Texts.wrap(row_labels, bold, 220)
    head = _Texts.wrap(column_labels, plain, cell_width)
    under = [_Texts.wrap(row, small, cell_width) for row in captions] if captions else []
    side_width = side.width + 18 if side.width else 0
    top = _Texts.wrap([title or ""], large, max(side_width + body_width, 320))
    under_heights = [texts.height + 6 if texts.height else 0 for texts in under] or [0] * len(rows)
    row_heights = [max(cell_height + u, height) for u, height in zip(under_heights, side.heights, strict=True)]
    left = margin + side_width
    head_top = margin + (top.height + 18 if top.height else 0)
    body_top = head_top + (head.height + 10 if head.height else 0)

    width = max(left + body_width, margin + top.width) + margin
    height = body_top + sum(row_heights) + gap * (len(rows) - 1) + margin
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top.draw(draw, 0, (margin, margin), INK)
    for column in range(columns):
        x = left + column * (cell_width + gap) + cell_width // 2
        head.draw(draw, column, (x, body_top - 10 - head.heights[column]), INK, centred=True)
    y = body_top
    for index, row in enumerate(shown):
        side.draw(draw, index, (margin, y + max(0, cell_height - side.heights[index]) // 2), INK)
        for column, picture in enumerate(row):
            x = left + column * (cell_width + gap)
            if picture is not None:
                corner = (x + (cell_width - picture.width) // 2, y + (cell_height - picture.height) // 2)
                sheet.paste(picture, corner)
            if under:
                under[index].draw(draw, column, (x + cell_width // 2, y + cell_height + 5), MUTED, centred=True)
        y += row_heights[index] + gap
    return sheet


def _shown(picture: Image | None, limit: int) -> Image | None:
    """The picture in RGB, enlarged by a whole factor or reduced so that its longest side is at most `limit` px."""
    from PIL import Image

    if picture is None:
        return None
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    picture = picture.convert("RGB")
    longest = max(picture.size)
    factor = limit // longest if longest <= limit else limit / longest
    if factor == 1:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Texts:
    """Wrapped texts in one font: their lines, and how much room each needs."""

    font: FreeTypeFont
    lines: list[list[str]]
    line_height: int

    @staticmethod
    def wrap(texts: Sequence[str], font: FreeTypeFont, width: int) -> _Texts:
        """Broken between words, and inside those that are wider than a line."""
        ascent, descent = font.getmetrics()
        return _Texts(font, [_wrapped(str(text), font, width) for text in texts], ascent + descent + 1)

    @property
    def heights(self) -> list[int]:
        return [self.line_height * len(lines) for lines in self.lines]

    @property
    def height(self) -> int:
        return max(self.heights, default=0)

    @property
    def width(self) -> int:
        return math.ceil(max((self.font.getlength(line) for lines in self.lines for line in lines), default=0))

    def draw(self, draw: ImageDraw, index: int, at: tuple[int, int], colour: str, centred: bool = False) -> None:
        x, y = at
        for number, line in enumerate(self.lines[index]):
            shift = round(self.font.getlength(line) / 2) if centred else 0
            draw.text((x - shift, y + number * self.line_height), line, font=self.font, fill=colour)


def _wrapped(text: str, font: FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            together = f"{line} {word}".strip()
            if font.getlength(together) <= width:
                line = together
                continue
            if line:
                lines.append(line)
            line = ""
            for letter in word:
                if line and font.getlength(line + letter) > width:
                    lines.append(line)
                    line = ""
                line += letter
        if line:
            lines.append(line)
    return lines


@cache
def _font(size_px: int, bold: bool = False) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size_px)


# ---------------------------------------------------------------------------------------------- curves

_RUN_COLOURS = ("#2563eb", "#e8590c", "#0f9d58", "#9333ea", "#0891b2", "#be185d", "#7c6f00", "#475569")
_TIMESTEP_COLUMN = re.compile(r"preference_t(\d+)")


@dataclass(frozen=True)
class _Run:
    """One metrics.csv. steps: update number of each row; columns: float arrays, NaN where a cell says nothing."""

    label: str
    colour: str
    steps: np.ndarray
    columns: Mapping[str, np.ndarray]

    def column(self, name: str) -> np.ndarray:
        return self.columns.get(name, self.steps * math.nan)

    def timesteps(self) -> list[int]:
        """Those with a column of their own, rising."""
        return sorted(int(match[1]) for match in map(_TIMESTEP_COLUMN.fullmatch, self.columns) if match)


@dataclass(frozen=True)
class _Panel:
    """What one small panel shows: a column times `scale`, or several, each with its name."""

    title: str
    columns: Mapping[str, str]
    scale: float = 1
    level: float | None = None
    level_name: str = ""
    from_zero: bool = False


_PANELS = (
    _Panel("Pools whose verdict was kept (%)", {"kept_share": ""}, scale=100, from_zero=True),
    _Panel("Density ratio, policy / reference", {"ratio_win": "win", "ratio_lose": "lose"}, level=1.0),
    _Panel("Pairs with a clamped ratio (%)", {"ratio_clamped_share": ""}, scale=100, from_zero=True),
    _Panel("Loss", {"loss": ""}, level=math.log(2), level_name="ln 2: no preference yet"),
    _Panel("Gradient norm", {"gradient_norm": ""}, from_zero=True),
    _Panel("Learning rate", {"learning_rate": ""}, from_zero=True),
    _Panel("Pictures per second, in all", {"images_per_s": ""}, from_zero=True),
    _Panel("Pairs per second, in training", {"pairs_per_s": ""}, from_zero=True),
)


def curves(csv_path: Path | str | Mapping[str, Path | str], png_path: Path | str, *, title: str | None = None) -> None:
    """Draw a run's metrics.csv into a PNG; a mapping {label: path} lays several runs over each other.

    Thin lines are single rollouts, thick ones running means. Columns that are missing, empty or no numbers leave their
    panel empty, and so does a run without rows yet. Raises SpoError for a file that is missing or unreadable.
    """
    from matplotlib.figure import Figure

    paths = dict(csv_path) if isinstance(csv_path, Mapping) else {_run_name(Path(csv_path)): csv_path}
    runs = [
        _read_run(label, Path(path), _RUN_COLOURS[number % len(_RUN_COLOURS)])
        for number, (label, path) in enumerate(paths.items())
    ]
    figure = Figure(figsize=(16, 10), dpi=110, facecolor="white")
    head = title or (f"SPO training: {runs[0].label}" if len(runs) == 1 else "SPO training")
    figure.text(0.045, 0.955, head, fontsize=17, weight="bold", color=INK)
    upper = figure.add_gridspec(1, 5, left=0.045, right=0.975, top=0.895, bottom=0.555, wspace=0.5)
    lower = figure.add_gridspec(2, 4, left=0.045, right=0.975, top=0.475, bottom=0.055, wspace=0.2, hspace=0.42)
    _draw_preference(figure.add_subplot(upper[0, :3]), runs)
    (_draw_timestep_map if len(runs) == 1 else _draw_timestep_lines)(figure.add_subplot(upper[0, 3:]), runs)
    for number, panel in enumerate(_PANELS):
        _draw_panel(figure.add_subplot(lower[divmod(number, 4)]), panel, runs, "update" if number > 3 else "")
    write_whole(Path(png_path), lambda temporary: figure.savefig(temporary, format="png"))


def _run_name(path: Path) -> str:
    return path.absolute().parent.name.removesuffix(".spo") if path.name == "metrics.csv" else path.stem


def _read_run(label: str, path: Path, colour: str) -> _Run:
    import numpy as np

    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise SpoError(f'there is no "{path}": curves are drawn from the metrics.csv in a run\'s folder.') from error
    except (OSError, csv.Error) as error:
        raise SpoError(f'"{path}" cannot be read ({error}).') from error
    names = list(dict.fromkeys(name for row in rows for name in row if name))
    columns = {name: np.array([_number(row.get(name)) for row in rows], dtype=float) for name in names}
    steps = columns.get("step", np.full(len(rows), np.nan))
    if not np.isfinite(steps).all():
        steps = np.arange(1.0, len(rows) + 1)
    return _Run(label, colour, steps, columns)


def _number(cell: object) -> float:
    try:
        value = float(str(cell))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the rows around each, 8 % of all; NaN does not count, and stays where all are NaN."""
    import numpy as np

    reach = len(values) // 25
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Means of the first and of the last tenth of the known values; NaN when there are none."""
    import numpy as np

    known = values[np.isfinite(values)]
    if not len(known):
        return math.nan, math.nan
    tenth = math.ceil(len(known) / 10)
    return float(known[:tenth].mean()), float(known[-tenth:].mean())


def _style(axes: Any, title: str, *, x_label: str = "", large: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    size, weight = (13, "bold") if large else (10.5, "normal")
    axes.set_title(title, loc="left", fontsize=size, weight=weight, color=INK, pad=8)
    axes.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:.5g}")
    axes.margins(x=0.01, y=0.1)
    axes.set_xlabel(x_label, color=MUTED, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#cbd0d8")


def _plot(axes: Any, run: _Run, values: np.ndarray, colour: str, label: str = "", dashed: bool = False) -> bool:
    """Thin line of the values, thick one of their running mean; False when there is nothing to draw."""
    import numpy as np

    known = np.isfinite(values)
    if not known.any():
        return False
    steps, smooth = run.steps[known], _running_mean(values)[known]
    marker = "o" if known.sum() < 3 else ""
    if len(values) >= 30:
        axes.plot(steps, values[known], color=colour, linewidth=0.8, alpha=0.28)
    style = "--" if dashed else "-"
    axes.plot(steps, smooth, style, color=colour, linewidth=1.9, marker=marker, label=label or None)
    return True


def _say_empty(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "no data yet", transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=10)


def _legend(axes: Any, large: bool = False) -> None:
    if axes.get_legend_handles_labels()[1]:
        size = 10 if large else 8.5
        axes.legend(fontsize=size, labelcolor=INK, loc="best", edgecolor="none", facecolor="white", framealpha=0.85)


def _draw_preference(axes: Any, runs: Sequence[_Run]) -> None:
    _style(axes, "Mean preference score of the candidates", x_label="update", large=True)
    drawn = False
    for run in runs:
        values = run.column("preference_mean")
        first, last = _ends(values)
        name = f"{run.label}: " if len(runs) > 1 else ""
        label = f"{name}{first:.3g} \N{RIGHTWARDS ARROW} {last:.3g}  (first and last tenth, {last - first:+.3g})"
        drawn = _plot(axes, run, values, run.colour, label) or drawn
    if not drawn:
        return _say_empty(axes)
    _legend(axes, large=True)


def _draw_timestep_map(axes: Any, runs: Sequence[_Run]) -> None:
    """Rows of the map are timesteps, colours the running mean of the score less the mean of the first tenth."""
    import numpy as np

    run = runs[0]
    _style(axes, "Gain in score by timestep", x_label="update", large=True)
    scores = {timestep: run.column(f"preference_t{timestep}") for timestep in run.timesteps()}
    gains = {t: _running_mean(values) - _ends(values)[0] for t, values in scores.items() if np.isfinite(values).any()}
    if not gains:
        return _say_empty(axes)
    values = np.ma.masked_invalid(np.stack(list(gains.values())))
    limit = float(np.abs(values).max()) or 1.0
    between = (run.steps[1:] + run.steps[:-1]) / 2
    edges = np.concatenate([[run.steps[0] - 0.5], between, [run.steps[-1] + 0.5]])
    image = axes.pcolormesh(edges, np.arange(len(gains) + 1), values, cmap="RdBu", vmin=-limit, vmax=limit)
    every = math.ceil(len(gains) / 8)
    axes.set_yticks([row + 0.5 for row in range(0, len(gains), every)], [str(t) for t in list(gains)[::every]])
    axes.set_ylabel("timestep, noisiest above", color=MUTED, fontsize=9)
    axes.grid(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.025, aspect=26)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=9, length=0)


def _draw_timestep_lines(axes: Any, runs: Sequence[_Run]) -> None:
    _style(axes, "Gain in score by timestep, last tenth less first", x_label="timestep, noisiest left", large=True)
    timesteps = sorted({timestep for run in runs for timestep in run.timesteps()}, reverse=True)
    if not timesteps:
        return _say_empty(axes)
    for run in runs:
        ends = [_ends(run.column(f"preference_t{timestep}")) for timestep in timesteps]
        points = [(place, last - first) for place, (first, last) in enumerate(ends) if math.isfinite(first)]
        places, gains = zip(*points, strict=True) if points else ((), ())
        axes.plot(places, gains, "o-", color=run.colour, linewidth=1.9, markersize=3.5, label=run.label)
    every = math.ceil(len(timesteps) / 8)
    axes.set_xticks(range(0, len(timesteps), every), [str(timestep) for timestep in timesteps[::every]])
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=":")
    _legend(axes)


def _draw_panel(axes: Any, panel: _Panel, runs: Sequence[_Run], x_label: str) -> None:
    _style(axes, panel.title, x_label=x_label)
    drawn = False
    for run in runs:
        for number, (column, name) in enumerate(panel.columns.items()):
            alone = len(runs) == 1
            colour = _RUN_COLOURS[number] if alone else run.colour
            label = name if alone or run is runs[0] else ""
            drawn = _plot(axes, run, run.column(column) * panel.scale, colour, label, number > 0 and not alone) or drawn
    if not drawn:
        return _say_empty(axes)
    if panel.level is not None:
        axes.axhline(panel.level, color=MUTED, linewidth=1.1, linestyle=":", label=panel.level_name or None)
    if panel.from_zero:
        top = 1.08 * axes.get_ylim()[1]
        axes.set_ylim(-0.02 * top, top)
    _legend(axes)
