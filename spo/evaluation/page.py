"""An evaluation as one HTML page that needs nothing else, and as tables for a spreadsheet.

The page has the pictures in it, follows the reader's light or dark, works without JavaScript (which only sorts and
enlarges), and asks for nothing from anywhere.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spo.evaluation.interval import Interval
from spo.evaluation.provenance import CHOSE, UNSEEN
from spo.evaluation.statistics import Statistic
from spo.evaluation.summary import Evaluation
from spo.images import to_picture

if TYPE_CHECKING:
    from torch import Tensor

TITLES = {  # name of a statistic -> what it is called, and what it says
    "wins": ("Wins against the base", "how often its picture scores above the base's of the same prompt and seed"),
    "score": ("Mean score", "what the judge gives; differences are log-odds of being preferred"),
    "adherence": ("Prompt adherence", "how well pictures show what their prompts ask for"),
    "recognised": ("Recognised subjects", "share of pictures in which the prompt's subject is the likeliest of all"),
    "diversity": ("Diversity", "mean distance between the seeds of one prompt; less than the base: they grow alike"),
    "drift": ("Drift", "mean distance from the base's picture of the same prompt and seed; it has no better side"),
    "colourfulness": ("Colourfulness", "Hasler and Suesstrunk; 0 is grey, 45 is average, 82 highly colourful"),
    "saturation": ("Saturation", "of HSV, 0 to 1"),
    "contrast": ("Contrast", "standard deviation of brightness, 0 to 0.5"),
}
_QUALITY = 82  # of WebP: 64 px are 1 kB, 512 px about 30


def webp(pixels: Tensor, largest_px: int) -> bytes:
    """A picture [3, H, W] in [-1, 1] as WebP, its longer side at most `largest_px`."""
    picture, buffer = to_picture(pixels), io.BytesIO()
    picture.thumbnail((largest_px, largest_px))
    picture.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- for spreadsheets


def statistics_csv(evaluation: Evaluation) -> str:
    """One line for each statistic of each column: mean and interval, and the difference from the base with its own."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ["mean", "low", "high", "difference", "difference_low", "difference_high"]
    writer.writerow(["column", "statistic", "by", "unit", *names])
    for statistic in evaluation.statistics:
        for label, value in statistic.values.items():
            parts = [value.of, value.difference]
            numbers = [_exact(number) for part in parts for number in _three(part)]
            writer.writerow([label, statistic.name, statistic.by, statistic.unit, *numbers])
    return file.getvalue()


def pictures_csv(evaluation: Evaluation) -> str:
    """One line for each picture: column, prompt, seed, each judge's score, and the drift."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["column", "prompt", "seed", *(f"score {judge.name}" for judge in evaluation.judges), "drift"])
    for label in evaluation.columns:
        for row, (prompt, seed) in enumerate(zip(evaluation.prompts, evaluation.seeds, strict=True)):
            scores = [_exact(judge.scores[label][row]) for judge in evaluation.judges]
            drift = _exact(evaluation.drifts[label][row]) if label in evaluation.drifts else ""
            writer.writerow([label, prompt, seed, *scores, drift])
    return file.getvalue()


def statistics_rows(evaluation: Evaluation) -> list[list[str]]:
    """The table as texts, for terminals: a statistic, then each column's mean with interval."""
    return [
        [name, *(f"{mean} ({ends})" if ends else mean for mean, ends in cells)]
        for name, cells in statistics_cells(evaluation)
    ]


def statistics_cells(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, str]]]]:
    """The same with a column's mean and its interval apart; the interval is empty where none is known."""
    return [
        (_heading(statistic), [_mean_and_ends(statistic, label) for label in evaluation.columns])
        for statistic in evaluation.statistics
    ]


def _three(interval: Interval | None) -> tuple[float, float, float]:
    return (math.nan,) * 3 if interval is None else (interval.mean, interval.low, interval.high)


def _exact(number: float) -> str:
    return f"{number:.6g}" if math.isfinite(number) else ""


def _heading(statistic: Statistic) -> str:
    title = TITLES[statistic.name][0]
    return f"{title} ({_by(statistic)})" if statistic.by else title


def _by(statistic: Statistic) -> str:
    return f"{statistic.by}, {statistic.unit}" if statistic.unit else statistic.by


def _mean_and_ends(statistic: Statistic, label: str) -> tuple[str, str]:
    value = statistic.values.get(label)
    return ("-", "") if value is None else value.of.parts(_form(statistic))


def _form(statistic: Statistic) -> str:
    return ".0%" if statistic.name in ("wins", "recognised") else ".3g"


# ---------------------------------------------------------------------------------------------- the page


def page(evaluation: Evaluation) -> str:
    """The whole document."""
    title = html.escape(evaluation.title)
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in evaluation.facts.items())
    remarks = "".join(f"<li>{html.escape(text)}</li>" for text in evaluation.remarks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{title}</h1><dl>{facts}</dl></header>
<main>
{f'<ul class="remarks">{remarks}</ul>' if remarks else ""}
<section aria-labelledby="numbers"><h2 id="numbers">Numbers</h2>{_table(evaluation)}</section>
<section aria-labelledby="pictures"><h2 id="pictures">Pictures</h2>
{_controls(evaluation)}
<div id="rows" data-by="{_first(evaluation)}">{_rows(evaluation)}</div>
</section>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _table(evaluation: Evaluation) -> str:
    roles = {judge.name: judge.role for judge in evaluation.judges}
    head = "".join(f'<th scope="col">{html.escape(label)}</th>' for label in evaluation.columns)
    lines = []
    for statistic in evaluation.statistics:
        title, says = TITLES[statistic.name]
        by = f"<span>{html.escape(_by(statistic))}</span>" if statistic.by else ""
        role = _role(roles[statistic.by]) if statistic.by in roles else ""
        cells = "".join(_cell(statistic, label) for label in evaluation.columns)
        lines.append(f'<tr><th scope="row">{title} {by} {role}<small>{html.escape(says)}</small></th>{cells}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table of statistics"><table><caption>'
        "Means with 95 % intervals over prompts; below them the difference from the base. ▲ more and ▼ less than the "
        f'base: the interval of the difference leaves out 0.</caption><thead><tr><th scope="col">Statistic</th>{head}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _role(role: str) -> str:
    kind = "unseen" if role == UNSEEN else "other"
    return f'<em class="{kind}">{html.escape(role)}</em>'


def _cell(statistic: Statistic, label: str) -> str:
    value, form = statistic.values.get(label), _form(statistic)
    if value is None:
        return '<td><span class="none">-</span></td>'
    text = f"<b>{value.of.mean:{form}}</b>{_between(value.of, form)}"
    difference = value.difference
    if statistic.name == "wins":
        sign = "▲" if value.of.low > 0.5 else "▼" if value.of.high < 0.5 else ""
        return f"<td>{text}<div>{sign}</div></td>"
    if difference is None:
        return f"<td>{text}</td>"
    sign = "▲" if difference.low > 0 else "▼" if difference.high < 0 else ""
    return f"<td>{text}<div>{sign} {difference.mean:+{form}}{_between(difference, form)}</div></td>"


def _between(interval: Interval, form: str) -> str:
    if not math.isfinite(interval.low):
        return ""
    return f" <span>({interval.low:{form}} to {interval.high:{form}})</span>"


def _controls(evaluation: Evaluation) -> str:
    keys = [(f"by {judge.name} ({judge.role})", number) for number, judge in enumerate(evaluation.judges)]
    keys.append(("by distance (drift)", len(evaluation.judges)))
    measures = "".join(f'<option value="{number}">{html.escape(text)}</option>' for text, number in keys)
    columns = "".join(
        f'<option value="{number}">{html.escape(label)}</option>' for number, label in enumerate(evaluation.columns[1:])
    )
    orders = {"apart": "differ most", "up": "LoRA ahead first", "down": "base ahead first", "none": "as listed"}
    order = "".join(f'<option value="{value}">{text}</option>' for value, text in orders.items())
    return (
        '<form id="sorting" hidden>'
        f'<label>Compare base with <select name="column">{columns}</select></label>'
        f'<label>Sort <select name="measure">{measures}</select></label>'
        f'<label>Show first what <select name="order">{order}</select></label>'
        '<label><input type="checkbox" name="large"> large pictures</label></form>'
        f'<p class="note">Sorted by where base and {html.escape(evaluation.columns[1])} differ most. A picture grows '
        "when it is clicked.</p>"
    )


def _rows(evaluation: Evaluation) -> str:
    """Sorted by where the first LoRA differs most, by `_first`."""
    base, *others = evaluation.columns
    differences = []  # row -> measure -> column
    for row in range(len(evaluation.prompts)):
        by_judge = [
            [judge.scores[label][row] - judge.scores[base][row] for label in others] for judge in evaluation.judges
        ]
        differences.append([*by_judge, [evaluation.drifts[label][row] for label in others]])
    first = _first(evaluation)
    order = sorted(range(len(differences)), key=lambda row: -abs(differences[row][first][0]))
    return "".join(_row(evaluation, row, differences[row]) for row in order)


def _first(evaluation: Evaluation) -> int:
    """The first judge that training never saw, else one that chose the stage, else the first of all, else distance."""
    roles = [judge.role for judge in evaluation.judges]
    return next((roles.index(role) for role in (UNSEEN, CHOSE) if role in roles), 0)


def _row(evaluation: Evaluation, row: int, differences: Sequence[Sequence[float]]) -> str:
    prompt, seed = evaluation.prompts[row], evaluation.seeds[row]
    name = f"{html.escape(prompt)}, seed {seed}"
    cells = []
    for label in evaluation.columns:
        picture = base64.b64encode(evaluation.pictures[label][row]).decode()
        scores = "".join(
            f"<dt>{html.escape(judge.name)}</dt><dd>{judge.scores[label][row]:.2f}</dd>" for judge in evaluation.judges
        )
        cells.append(
            f'<figure><button type="button" aria-pressed="false"><img loading="lazy" decoding="async" '
            f'alt="{html.escape(label)}: {name}" src="data:image/webp;base64,{picture}"></button>'
            f"<figcaption>{html.escape(label)}<dl>{scores}</dl></figcaption></figure>"
        )
    data = html.escape(json.dumps([[round(value, 4) for value in part] for part in differences]))
    return f'<article data-row="{row}" data-by="{data}"><h3>{name}</h3><div>{"".join(cells)}</div></article>'


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2230;--soft:#576074;--line:#d5d9e2;--page:#fff;--box:#f5f6f9;--mark:#0b57c2}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f0;--soft:#a9b1c2;--line:#3a4150;--page:#14171d;--box:#1d2129;
--mark:#8ab4ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:16px 20px 60px;background:var(--page);color:var(--ink);
font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.3em 0}h2{font-size:1.2rem;margin:1.6em 0 .5em}h3{font-size:1rem;margin:0 0 6px}
header dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:0;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.remarks{border-left:4px solid var(--mark);background:var(--box);margin:16px 0;padding:10px 14px 10px 30px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem}
caption{text-align:left;color:var(--soft);padding-bottom:8px}
th,td{border-bottom:1px solid var(--line);padding:7px 12px 7px 0;text-align:left;vertical-align:top;font-weight:400}
thead th{font-weight:600;overflow-wrap:anywhere}
tbody th{min-width:230px;font-weight:600}tbody th span{font-weight:400;overflow-wrap:anywhere}
small{display:block;font-weight:400;color:var(--soft)}
td{white-space:nowrap}td span{color:var(--soft)}
em{font-style:normal;font-weight:400;font-size:.78rem;border:1px solid var(--line);border-radius:9px;padding:1px 7px;
color:var(--soft);white-space:nowrap}
em.unseen{border-color:var(--mark);color:var(--mark)}
label{max-width:100%}
form{display:flex;flex-wrap:wrap;gap:8px 18px;margin-bottom:6px;align-items:center}form[hidden]{display:none}
select,input{font:inherit}select{max-width:100%;padding:3px 6px;color:var(--ink);background:var(--box);
border:1px solid var(--soft);border-radius:5px}
.note{color:var(--soft);font-size:.9rem;margin:4px 0 12px}
#rows{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:14px}
article{background:var(--box);border:1px solid var(--line);border-radius:8px;padding:10px 12px;min-width:0}
article>div{display:flex;flex-wrap:wrap;gap:10px}
figure{margin:0;min-width:0;max-width:100%}
button{display:block;padding:0;border:0;background:none;cursor:zoom-in;max-width:100%}
button[aria-pressed=true]{cursor:zoom-out}
img{display:block;width:160px;height:auto;max-width:100%;border-radius:4px}
button[aria-pressed=true] img,.large img{width:min(512px,86vw)}
article:has(button[aria-pressed=true]),.large article{grid-column:1/-1}
:focus-visible{outline:3px solid var(--mark);outline-offset:2px}
figcaption{font-size:.82rem;max-width:160px;overflow-wrap:anywhere;margin-top:4px}
figcaption dl{display:grid;grid-template-columns:1fr max-content;gap:0 8px;margin:0}
figcaption dd{font-variant-numeric:tabular-nums}
"""

_SCRIPT = """
const form=document.getElementById('sorting'),rows=document.getElementById('rows');
form.hidden=false;document.querySelector('.note').textContent='A picture grows when it is clicked.';
const start=[...rows.children];
form.measure.value=rows.dataset.by;
form.addEventListener('change',()=>{
 rows.classList.toggle('large',form.large.checked);
 const value=row=>JSON.parse(row.dataset.by)[form.measure.value][form.column.value];
 const keys={apart:row=>-Math.abs(value(row)),up:row=>-value(row),down:value,none:row=>Number(row.dataset.row)};
 const key=keys[form.order.value];
 rows.append(...start.map(row=>[key(row),row]).sort((a,b)=>a[0]-b[0]).map(pair=>pair[1]));
});
form.addEventListener('submit',event=>event.preventDefault());
rows.addEventListener('click',event=>{
 const button=event.target.closest('button');
 if(button)button.setAttribute('aria-pressed',button.getAttribute('aria-pressed')!=='true');
});
"""
