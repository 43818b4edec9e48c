"""Trained too long on purpose: does the held-out judge choose a stage that the true rule would have chosen?

    python -m benchmarks.chosen_stage --folder FOLDER --output docs/chosen_stage.csv --seeds 0 1 2

For each seed: the demo's settings at learning rate 3e-4 for 240 updates, whatever its judges say, a check every 10.
Then the stages, the chosen one among them, are judged by the rule and the classifier on the demonstration's 64 held-out
pairs of prompt and seed, which neither training nor the checks used: up to the third in a row that has lost a tenth of
the subjects, since none after it can be the best that keeps them. A row for each stage. What was done is not done
again: run the same command to go on.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from spo.demo.judge import Judge, Judgement, held_out, taste_win_rate
from spo.demo.run import demo_config
from spo.files import write_whole
from spo.headless.compare import adapter_from_file, pictures
from spo.headless.host import HeadlessHost, load_host
from spo.preference.load import load_preference
from spo.progress import Watcher
from spo.prompts import read_prompts
from spo.runs.layout import RunFiles, split_stage
from spo.runs.metrics import read_metrics
from spo.training.judges import load_judges
from spo.training.loop import train

COLUMNS = ("seed", "step", "chosen", "taste", "win_rate", "recognised", "judge", "adherence_lost", "diversity_lost")
RUINED = (0.9, 3)  # so few subjects in so many stages in a row
CHECKS = ("judge", "adherence_lost", "diversity_lost")  # columns of validation.csv


def trained(folder: Path, seed: int, steps: int, every: int) -> RunFiles:
    """The run of a seed, all its stages on disk; begun, gone on with or left as it is."""
    changes = {
        "seed": seed, "learning_rate": 3e-4, "steps": steps, "patience": 0, "on_decline": "warn",
        "validate_every": every, "save_every": every, "keep_last": 0, "sample_every": 0,
    }  # fmt: skip
    config = demo_config(folder / f"seed{seed}", changes)
    files = RunFiles.of(config.run.output)
    if files.output.exists():
        return files
    host = load_host(config)
    preference = load_preference(config, host.device, host.architecture)
    files.output.parent.mkdir(parents=True, exist_ok=True)
    watcher = Watcher(log=lambda text: print(f"seed {seed}: {text}", flush=True))
    judges = load_judges(config, host, watcher.log)
    prompts = read_prompts(config.prompt.prompts)
    train(host, config, prompts, preference, watcher, resume=files.state.exists(), judges=judges)
    return files


def chosen_step(checks: Mapping[int, Mapping[str, float]]) -> int:
    """The stage that a run took for the best, of its checks, step -> row of validation.csv: the last, where it took
    none."""
    return next((step for step, row in checks.items() if row.get("best")), max(checks))


def judge_stages(files: RunFiles, seed: int, every: int, known: Sequence[dict[str, str]], path: Path) -> None:
    """Add the rows of a run's stages to the CSV, one at a time: every so many updates, and the chosen one."""
    checks = {int(row["step"]): row for row in read_metrics(files.validation)}
    chosen = chosen_step(checks)
    stages = {split_stage(stage.stem)[1]: stage for stage in files.stages()}
    mine = {int(row["step"]): row for row in known if int(row["seed"]) == seed}
    for step, row in mine.items():
        row["chosen"] = str(int(step == chosen))
    rows = list(known)
    write_whole(path, lambda temporary: _write(temporary, rows))
    wanted = [0, *sorted(step for step in stages if step and (step % every == 0 or step == chosen))]
    host, base, ruined = None, None, 0
    for step in wanted:
        row = mine.get(step)
        if row is None and (ruined < RUINED[1] or step == chosen):
            if host is None:
                host, base = _base(files)
            assert base is not None
            verdict = base if step == 0 else _verdict(host, stages[step])
            row = {
                "seed": str(seed), "step": str(step), "chosen": str(int(step == chosen)),
                "taste": str(float(verdict.taste.mean())),
                "win_rate": str(taste_win_rate(verdict, base).rate if step else 0.5),
                "recognised": str(verdict.recognised_share),
                **{name: str(checks[step].get(name, "")) for name in CHECKS},
            }  # fmt: skip
            rows.append(row)
            write_whole(path, lambda temporary: _write(temporary, rows))
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if row is not None and ruined < RUINED[1]:
            ruined = ruined + 1 if float(row["recognised"]) < RUINED[0] else 0


def _base(files: RunFiles) -> tuple[HeadlessHost, Judgement]:
    host = load_host(demo_config(files.folder))
    host.prepare(held_out()[0])
    return host, _verdict(host, None)


def _verdict(host: HeadlessHost, lora: Path | None) -> Judgement:
    prompts, seeds = held_out()
    adapter = None if lora is None else adapter_from_file(host, lora)
    verdict = Judge().judge(pictures(host, prompts, seeds, eta=1.0), prompts)
    if adapter is not None:
        adapter.remove()
    return verdict


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summary(rows: Sequence[dict[str, str]], kept: float = 0.98, points: float = 0.03) -> str:
    """A line for each seed: the chosen stage against the best that keeps its subjects, both by the rule; then in how
    many seeds it wins at most `points` less and keeps them, too."""
    lines, good = [], []
    for seed in sorted({int(row["seed"]) for row in rows}):
        mine = [row for row in rows if int(row["seed"]) == seed]
        chosen = next((row for row in mine if int(row["chosen"])), None)
        keeping = [row for row in mine if float(row["recognised"]) >= kept]
        if chosen is None or not keeping:
            continue
        taste, wins = (max(float(row[name]) for row in keeping) for name in ("taste", "win_rate"))
        lines.append(
            f"seed {seed}: update {chosen['step']} chosen, keeps {float(chosen['recognised']):.1%} of the subjects; "
            f"wins {float(chosen['win_rate']):.1%} (best {wins:.1%}), colourfulness {float(chosen['taste']):.1f} "
            f"(best {taste:.1f})"
        )
        good.append(float(chosen["recognised"]) >= kept and float(chosen["win_rate"]) >= wins - points)
    return "\n".join([*lines, f"{sum(good)} of {len(good)} within {points:.0%} of the best with {kept:.0%} kept"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--output", type=Path, required=True, help="the CSV")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=10, help="updates between checks")
    parser.add_argument("--judge-every", type=int, default=10, help="updates between the stages that the rule judges")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        files = trained(arguments.folder, seed, arguments.steps, arguments.every)
        known = []
        if arguments.output.exists():
            with arguments.output.open(newline="", encoding="utf-8") as file:
                known = list(csv.DictReader(file))
        judge_stages(files, seed, arguments.judge_every, known, arguments.output)
    with arguments.output.open(newline="", encoding="utf-8") as file:
        print(summary(list(csv.DictReader(file))))


if __name__ == "__main__":
    main()
