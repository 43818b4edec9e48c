"""Labelled grids of pictures.

Pillow and matplotlib (for its fonts) are imported where they are used. All text is set in DejaVu Sans, which comes with
matplotlib and looks the same with every version of Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

INK, MUTED = "#1f2430", "#667085"  # of texts: important, and beside it


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
    cell_px        longest side of a picture on the sheet; default: the largest picture's, but 256 to 512. Smaller
                   pictures are enlarged by a whole factor, larger ones reduced

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
    cells = [[_sized(picture, limit) for picture in row] for row in rows]
    sizes = [picture.size for row in cells for picture in row if picture is not None] or [(limit, limit)]
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
    for index, row in enumerate(cells):
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


def _sized(picture: Image | None, limit: int) -> Image | None:
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
