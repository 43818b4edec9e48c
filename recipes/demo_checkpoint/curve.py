"""True taste and recognised subjects against training: the curve from which the demo's default settings were chosen.

    python -m recipes.demo_checkpoint.curve --folder curve_run --output docs/demo_curve --learning-rates 1e-4 3e-4 1e-3

For each learning rate: train with the demo's settings, save a stage every --every updates, judge each stage on the
held-out pairs. Writes OUTPUT.csv and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from spo.demo.judge import Judge, Judgement, held_out, taste_win_rate
from spo.demo.run import demo_config
from spo.headless.compare import adapter_from_file, pictures
from spo.headless.host import HeadlessHost, load_host
from spo.preference.load import load_preference
from spo.prompts import read_prompts
from spo.runs.layout import RunFiles, split_stage
from spo.training.loop import train

COLUMNS = (
    "learning_rate",
    "step",
    "win_rate",
    "win_low",
    "win_high",
    "taste",
    "recognised",
    "base_taste",
    "base_recognised",
)


def judge_stages(folder: Path, learning_rate: float, steps: int, every: int) -> list[dict[str, Any]]:
    """Train one run and judge its stages: rows of COLUMNS."""
    changes = {"learning_rate": learning_rate, "steps": steps, "save_every": every, "keep_last": 0, "sample_every": 0}
    config = demo_config(folder, changes)
    host = load_host(config)
    train(host, config, read_prompts(config.prompt.prompts), load_preference(config, host.device, host.architecture))
    output = Path(config.run.output)
    prompts, seeds = held_out()
    host.prepare(prompts)
    judge = Judge()

    def judged(on: HeadlessHost) -> Judgement:
        return judge.judge(pictures(on, prompts, seeds, eta=config.rollout.eta), prompts)

    base = judged(host)
    rows = []
    for path in [*RunFiles.of(output).stages(), output]:
        adapter = adapter_from_file(host, path)
        verdict = judged(host)
        adapter.remove()
        step = split_stage(path.stem)[1] or steps
        rate = taste_win_rate(verdict, base)
        values = (
            learning_rate, step, rate.rate, rate.low, rate.high, float(verdict.taste.mean()), verdict.recognised_share,
            float(base.taste.mean()), base.recognised_share,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        print(
            f"lr {learning_rate:g} step {step}: wins {rate.rate:.0%}, recognised {verdict.recognised_share:.0%}",
            flush=True,
        )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels over updates: win rate with its interval, the mean by the rule, and the share of pictures that keep
    their subject."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    FigureCanvasAgg(figure)
    wins, taste, recognised = figure.subplots(1, 3)
    for rate in dict.fromkeys(row["learning_rate"] for row in rows):
        mine = [row for row in rows if row["learning_rate"] == rate]
        steps = [row["step"] for row in mine]
        line = wins.plot(steps, [row["win_rate"] for row in mine], marker="o", label=f"learning rate {rate:g}")[0]
        low, high = ([row[name] for row in mine] for name in ("win_low", "win_high"))
        wins.fill_between(steps, low, high, color=line.get_color(), alpha=0.12)
        taste.plot(steps, [row["taste"] for row in mine], marker="o", color=line.get_color())
        recognised.plot(steps, [row["recognised"] for row in mine], marker="o", color=line.get_color())
    base = rows[0]["base_recognised"]
    wins.axhline(0.95, color="grey", linestyle=":", linewidth=1)
    taste.axhline(rows[0]["base_taste"], color="grey", linewidth=1)
    recognised.axhline(base, color="grey", linewidth=1)
    recognised.axhline(base - 0.02, color="grey", linestyle=":", linewidth=1)
    wins.set(title="wins by the rule (64 held-out pairs; dotted: 95 %)", xlabel="updates", ylim=(0, 1.02))
    taste.set(title="colourfulness (line: base)", xlabel="updates")
    recognised.set(title="subject recognised (line: base, dotted: 2 points less)", xlabel="updates", ylim=(0, 1.02))
    wins.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.csv and OUTPUT.png")
    parser.add_argument("--learning-rates", type=float, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=100)
    arguments = parser.parse_args()
    rows = []
    for rate in arguments.learning_rates:
        rows += judge_stages(arguments.folder / f"lr{rate:g}", rate, arguments.steps, arguments.every)
    with arguments.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
