"""Tables and figures of docs/evidence.md from the finished runs in a work folder.

docs/evidence/runs.csv      one row for each stop of each run
docs/evidence/compared.csv  each variant against the paper's settings, at one cost
docs/evidence/second_taste.csv  the second taste, stop by stop
docs/evidence/dpo.png, ablations.png, options.png, balance.png
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.experiments import BUDGET
from spo.demo.judge import held_out
from spo.evaluation.interval import Interval, bootstrap_interval
from spo.files import write_text, write_whole
from spo.report.tables import table
from spo.report.win_rate import win_rate

DOCS = Path(__file__).resolve().parents[2] / "docs" / "evidence"
PAPER = "paper"


@dataclass(frozen=True)
class Stop:
    """One stop of a run: costs in evaluations, and what the judge said of the 64 held-out pictures."""

    experiment: str
    variant: str
    seed: int
    learning_rate: float
    updates: int
    evaluations: dict[str, int]
    taste: list[float]
    base: list[float]
    recognised: list[float]
    diversity: list[float]

    @property
    def cost(self) -> int:
        return sum(self.evaluations.values())

    def gains(self) -> list[float]:
        """[64] how much more of the rule's taste than the untrained checkpoint, picture by picture."""
        return [after - before for after, before in zip(self.taste, self.base, strict=True)]

    def gains_at_budget(self) -> list[float]:
        """The same brought to the cost `BUDGET`, as if it grew with the cost."""
        return [gain * BUDGET / self.cost for gain in self.gains()]


def read_stops(work: Path) -> list[Stop]:
    """Every stop of every finished run, without the untrained one."""
    stops = []
    for path in sorted(work.glob("*--*--*.json")):
        facts = json.loads(path.read_text())
        run, rows = facts["run"], facts["rows"]
        for row in rows[1:]:
            judged = row["judged"]
            stops.append(
                Stop(
                    run["experiment"], run["variant"], run["seed"], facts["config"]["learning_rate"], row["updates"],
                    row["evaluations"], judged["taste"], rows[0]["judged"]["taste"], judged["recognised"],
                    judged["diversity"],
                )
            )  # fmt: skip
    return stops


def last_stops(stops: Sequence[Stop], experiment: str) -> dict[str, dict[int, Stop]]:
    """variant -> seed -> the last stop of that run."""
    by_variant: dict[str, dict[int, Stop]] = {}
    for stop in stops:
        if stop.experiment == experiment:
            former = by_variant.setdefault(stop.variant, {}).get(stop.seed)
            if former is None or stop.cost > former.cost:
                by_variant[stop.variant][stop.seed] = stop
    return by_variant


def over_prompts(values: Sequence[Sequence[float]]) -> Interval:
    """Of values of the 64 held-out pictures for each of some runs: the mean and its interval over prompts.

    A prompt's pictures are drawn together, with those of all runs: what differs between runs of other seeds shows in
    the table, beside it.
    """
    prompts = held_out(64)[0]
    return bootstrap_interval([value for row in values for value in row], prompts * len(values))


def compared(stops: Sequence[Stop], experiment: str) -> list[dict[str, Any]]:
    """One row for each variant: its gain at the budget, and how much more that is than the paper's of the same seed."""
    papers = last_stops(stops, "ablations").get(PAPER, {})
    rows = []
    for variant, by_seed in last_stops(stops, experiment).items():
        runs = [by_seed[seed] for seed in sorted(by_seed)]
        gain = over_prompts([run.gains_at_budget() for run in runs])
        row = {
            "experiment": experiment,
            "variant": variant,
            "seeds": len(runs),
            "updates": _mean([run.updates for run in runs]),
            "evaluations": _mean([run.cost for run in runs]),
            "gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high,
            "gain_of_each_seed": " ".join(f"{_mean(run.gains_at_budget()):.1f}" for run in runs),
            "more_than_paper": None, "more_low": None, "more_high": None,
            "recognised": _mean([_mean(run.recognised) for run in runs]),
            "diversity": _mean([_mean(run.diversity) for run in runs]),
        }  # fmt: skip
        both = [(by_seed[seed], papers[seed]) for seed in sorted(by_seed) if seed in papers]
        if variant != PAPER and both:
            more = over_prompts([
                [a - b for a, b in zip(run.gains_at_budget(), paper.gains_at_budget(), strict=True)]
                for run, paper in both
            ])  # fmt: skip
            row |= {"more_than_paper": more.mean, "more_low": more.low, "more_high": more.high}
        rows.append(row)
    return sorted(rows, key=lambda row: (row["variant"] != PAPER, -row["gain"]))


def run_rows(stops: Sequence[Stop]) -> list[dict[str, Any]]:
    """One row for each stop."""
    rows = []
    for stop in stops:
        gain = over_prompts([stop.gains()])
        wins = win_rate(stop.taste, stop.base)
        rows.append({
            "experiment": stop.experiment, "variant": stop.variant, "seed": stop.seed,
            "learning_rate": stop.learning_rate, "updates": stop.updates, **stop.evaluations,
            "evaluations": stop.cost, "taste": _mean(stop.taste), "base_taste": _mean(stop.base),
            "gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high, "win_rate": wins.rate,
            "recognised": _mean(stop.recognised), "diversity": _mean(stop.diversity),
        })  # fmt: skip
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Floats with four digits behind the point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()})
    write_text(path, text.getvalue())


def report(work: Path) -> None:
    """Everything into docs/evidence."""
    stops = read_stops(work)
    DOCS.mkdir(exist_ok=True)
    write_csv(DOCS / "runs.csv", run_rows(stops))
    tables = {name: compared(stops, name) for name in ("ablations", "options")}
    write_csv(DOCS / "compared.csv", [row for rows in tables.values() for row in rows])
    for name, rows in tables.items():
        if rows:
            _draw_bars(rows, tables["ablations"], name, DOCS / f"{name}.png")
    _draw_dpo(stops, work, DOCS / "dpo.png")
    balance = work / "balance.json"
    if balance.exists():
        rows = json.loads(balance.read_text())
        write_csv(DOCS / "balance.csv", rows)
        _draw_balance(rows, DOCS / "balance.png")
    for name, rows in tables.items():
        print(f"\n{name}\n\n{markdown(rows)}")
    print(f"\ncosts\n\n{costs(stops)}")
    sharper = second_taste(work)
    if sharper:
        write_csv(DOCS / "second_taste.csv", sharper)
        print(f"\nsecond taste\n\n{second_taste_table(sharper)}")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/evidence.md."""
    headers = [
        "variant", "seeds", "updates", "evaluations", f"gain at {BUDGET}", "of each seed", "more than paper",
        "kept subjects", "diversity",
    ]  # fmt: skip
    cells = []
    for row in rows:
        gain = Interval(row["gain"], row["gain_low"], row["gain_high"]).text(".1f")
        more = "-"
        if row["more_than_paper"] is not None:
            more = Interval(row["more_than_paper"], row["more_low"], row["more_high"]).text("+.1f")
        cells.append([
            row["variant"], row["seeds"], f"{row['updates']:.0f}", f"{row['evaluations']:.0f}", gain,
            row["gain_of_each_seed"].replace(" ", ", "), more, f"{row['recognised']:.1%}", f"{row['diversity']:.4f}",
        ])  # fmt: skip
    return table(cells, headers, markdown=True)


def costs(stops: Sequence[Stop]) -> str:
    """SPO and DPO stop by stop, as a table: what each cost and came to; what two experiments have in common, once."""
    rows = []
    for (method, rate), runs in sorted(_lines(stops).items()):
        for of_run in runs.values():
            for stop in sorted(of_run, key=lambda one: one.cost):
                kept = f"{_mean(stop.recognised):.1%}"
                rows.append((f"{method}, {rate:g}", stop.seed, stop.updates, stop.cost, _mean(stop.taste), kept))
    rows = sorted(dict.fromkeys(rows), key=lambda row: row[:4])
    return table(rows, ["method, rate", "seed", "updates", "evaluations", "taste", "kept subjects"], markdown=True)


def second_taste(work: Path) -> list[dict[str, Any]]:
    """One row for each stop of the runs that follow sharpness: what both rules say, wins by sharpness, subjects."""
    rows = []
    for path in sorted(work.glob("second_taste--*--*.json")):
        facts = json.loads(path.read_text())
        base = facts["rows"][0]["judged"]
        for row in facts["rows"][1:]:
            judged, wins = row["judged"], win_rate(row["judged"]["sharpness"], base["sharpness"])
            values: dict[str, Any] = {
                "seed": facts["run"]["seed"], "updates": row["updates"], "evaluations": sum(row["evaluations"].values())
            }  # fmt: skip
            for rule in ("sharpness", "colourfulness"):
                gain = over_prompts([[a - b for a, b in zip(judged[rule], base[rule], strict=True)]])
                values |= {f"base_{rule}": _mean(base[rule]), rule: _mean(judged[rule])}
                values |= {f"{rule}_gain_low": gain.low, f"{rule}_gain_high": gain.high}
            values |= {"win_rate": wins.rate, "win_low": wins.low, "win_high": wins.high}
            values |= {name: _mean(judged[name]) for name in ("recognised", "diversity")}
            rows.append(values)
    return rows


def second_taste_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/evidence.md: gains with their intervals over prompts."""

    def gain(row: dict[str, Any], rule: str, form: str) -> str:
        mean = row[rule] - row[f"base_{rule}"]
        return Interval(mean, row[f"{rule}_gain_low"], row[f"{rule}_gain_high"]).text(form)

    cells = [
        [
            row["seed"], row["updates"], row["evaluations"], gain(row, "sharpness", "+.3f"),
            f"{row['win_rate']:.0%} ({row['win_low']:.0%} to {row['win_high']:.0%})",
            gain(row, "colourfulness", "+.1f"), f"{row['recognised']:.1%}", f"{row['diversity']:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    headers = ["seed", "updates", "evaluations", "sharpness", "wins", "colourfulness", "kept subjects", "diversity"]
    return table(cells, headers, markdown=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _draw_bars(rows: Sequence[dict[str, Any]], paper_rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.42 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    paper = next((row["gain"] for row in paper_rows if row["variant"] == PAPER), None)
    for place, row in enumerate(reversed(rows)):
        low, high = row["gain"] - row["gain_low"], row["gain_high"] - row["gain"]
        axes.barh(place, row["gain"], xerr=[[low], [high]], color="#3f8fd2", ecolor="#1b2a41", capsize=3)
        seeds = [float(value) for value in row["gain_of_each_seed"].split()]
        axes.plot(seeds, [place] * len(seeds), "o", color="#c0392b", markersize=4)
    axes.set_yticks(range(len(rows)), [f"{row['variant']} ({row['recognised']:.0%})" for row in reversed(rows)])
    if paper is not None:
        axes.axvline(paper, color="#667085", linestyle=":", linewidth=1)
    axes.set_xlabel(f"gain of true taste at {BUDGET} evaluations; dots: seeds; in brackets: kept subjects")
    axes.set_title(title, loc="left")
    _save(figure, path)


def _draw_dpo(stops: Sequence[Stop], work: Path, path: Path) -> None:
    """True taste and kept subjects over the cost of training; DPO's pairs counted as given, and as made."""
    from matplotlib.figure import Figure

    facts = work / "dpo_pairs.json"
    made = sum(json.loads(facts.read_text())["evaluations"].values()) if facts.exists() else 0
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    taste, kept = figure.subplots(1, 2)
    for (method, rate), runs in sorted(_lines(stops).items()):
        colour = {"SPO": "#c0392b", "DPO": "#1b4f9c"}[method]
        style = "-" if rate > 2e-3 else "--"
        for number, (_, of_run) in enumerate(sorted(runs.items())):
            line = sorted(of_run, key=lambda stop: stop.cost)
            label = f"{method}, rate {rate:g}" if number == 0 else None
            costs, values = [0, *(stop.cost for stop in line)], [_mean(line[0].base), *(_mean(s.taste) for s in line)]
            taste.plot(costs, values, style, color=colour, marker="o", markersize=4, linewidth=1.3, label=label)
            kept.plot(costs, [1, *(_mean(s.recognised) for s in line)], style, color=colour, marker="o", markersize=4)
            if method == "DPO" and made:
                shifted = [made + cost for cost in costs]
                taste.plot(shifted, values, style, color=colour, alpha=0.4, marker="o", markersize=3, linewidth=1)
    if made:
        taste.axvline(made, color="#1b4f9c", linestyle=":", linewidth=1)
        taste.annotate("DPO, its pairs made", (0.97 * made, 80), fontsize=8, color="#1b4f9c", rotation=90, ha="right")
    taste.set(title="true taste (colourfulness)", xlabel="network evaluations")
    kept.set(title="kept subjects", xlabel="network evaluations of training", ylim=(0.75, 1.01))
    taste.legend(fontsize=8, loc="upper right")
    for axes in (taste, kept):
        axes.grid(True, color="#e4e7ec")
    _save(figure, path)


def _lines(stops: Sequence[Stop]) -> dict[tuple[str, float], dict[str, list[Stop]]]:
    """(method, learning rate) -> run -> its stops."""
    methods = {"learning rate": "SPO", "dpo rate": "DPO", "dpo": ""}
    lines: dict[tuple[str, float], dict[str, list[Stop]]] = {}
    for stop in stops:
        method = methods.get(stop.experiment) or stop.variant
        is_paper = stop.experiment == "ablations" and stop.variant == PAPER
        if is_paper or (stop.experiment in methods and method in ("SPO", "DPO")):
            key = ("SPO" if is_paper else method, stop.learning_rate)
            lines.setdefault(key, {}).setdefault(f"{stop.experiment} {stop.seed}", []).append(stop)
    return lines


def _draw_balance(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    weights, clamped = figure.subplots(1, 2)
    first = [row for row in rows if row["lora"] == rows[0]["lora"]]
    timesteps = [row["timestep"] for row in first]
    for name in ("paper", "gradspo", "equal"):
        weights.plot(timesteps, [row[f"weight_{name}"] for row in first], "o-", markersize=4, label=name)
    weights.set(title="weight of a step's pairs, w_t", xlabel="timestep")
    weights.legend()
    for lora in dict.fromkeys(row["lora"] for row in rows):
        mine = [row for row in rows if row["lora"] == lora]
        clamped.plot(
            [row["timestep"] for row in mine], [row["clamped"] for row in mine], "o-", markersize=4, label=lora
        )
    clamped.set(title="share of pairs with a clamped ratio", xlabel="timestep")
    clamped.legend(fontsize=8)
    for axes in (weights, clamped):
        axes.invert_xaxis()
        axes.grid(True, color="#e4e7ec")
    _save(figure, path)
