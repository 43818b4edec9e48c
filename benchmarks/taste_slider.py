"""The taste slider on the demo checkpoint: 60 votes, a head, and pictures that follow it without training.

    python benchmarks/taste_slider.py --work FOLDER [--tastes colourful large grey]

Votes, as the SPO tab asks for them: 12 pools of four pictures of the demo's training prompts, same seed, other noise
from step 4 of 20 on; the best and the worst of each pool say five of its six comparisons, so 24 keys say 60 votes. The
voters are those of simulated_voters.py: a rule on the finished pictures, 10 % of the answers flipped. The head is the
product's own fit.

Pictures: the 64 held-out pairs of prompt and seed that judge the demonstration, ancestral sampling, 20 steps. Without
the head, steered at strengths 0.25 to 6, and as the best of K candidates at each step; judged by the rule (which
sampling never sees), by the demo's classifier of subjects, and by CPU time, of which the least of three is taken.

FOLDER keeps what was made, and the command goes on from there. Leaves docs/taste_slider.csv, taste_slider.png (curves)
and taste_slider_grid.png (pictures).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.simulated_voters import FLIPPED, rule_of, write_csv
from spo.algorithm.rollout import RolloutSettings, sample_spo
from spo.demo.judge import HERE, Judge, held_out
from spo.demo.run import demo_config
from spo.files import write_whole
from spo.headless.host import HeadlessHost, load_host
from spo.images import to_picture
from spo.preference.choose import sample_best
from spo.preference.load import load
from spo.preference.steer import Steering, steered
from spo.preference.taste.fit import VoteSet, fit_taste
from spo.preference.taste.head import TasteHead, save_taste
from spo.prompts import read_prompts
from spo.report.grids import grid
from spo.report.win_rate import win_rate
from spo.rng import SeededDraws, generator, stable_seed
from spo.training.vote_pairs import make_pools

ROOT = Path(__file__).resolve().parent.parent
TASTES = ("colourful", "large", "grey")
POOLS, FROM_STEP = 12, 4
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CANDIDATES = (4, 8, 16)
SHOWN = (0.25, 0.5, 1.0, 2.0, 4.0)  # in the grid, with the last one too much
BATCH = 32


def make_votes(work: Path, host: HeadlessHost) -> dict[str, Tensor]:
    """latents [12, 4, 4, 8, 8] and pixels [12, 4, 3, 64, 64] uint8 of the pools."""
    path = work / "pools.safetensors"
    if not path.exists():
        every = read_prompts(str(HERE / "prompts.txt"))
        prompts = [every[stable_seed("slider", n) % len(every)] for n in range(POOLS)]
        host.prepare(prompts)
        pools = make_pools(host, prompts, [stable_seed("slider", n) % 2**32 for n in range(POOLS)], 4, FROM_STEP)
        pixels = [torch.stack([as_tensor(picture) for picture in pool.pictures]) for pool in pools]
        tensors = {"latents": torch.stack([pool.latents for pool in pools]), "pixels": torch.stack(pixels)}
        write_whole(path, lambda temporary: save_file(tensors, temporary))
    return load_file(path)


def as_tensor(picture: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def vote_set(pools: Mapping[str, Tensor], taste: str) -> VoteSet:
    """Five comparisons of each pool, sides drawn at random, 10 % flipped."""
    pairs, answers, groups = [], [], []
    for number, (latents, pixels) in enumerate(zip(pools["latents"], pools["pixels"], strict=True)):
        order = rule_of(taste, pixels.float() / 127.5 - 1).argsort(descending=True).tolist()
        best, *middle, worst = order
        for better, worse in [(best, worst), *((best, one) for one in middle), *((one, worst) for one in middle)]:
            draw = generator("slider", taste, number, better, worse)
            swapped, flipped = torch.rand(2, generator=draw).tolist()
            sides = (worse, better) if swapped < 0.5 else (better, worse)
            pairs.append(latents[list(sides)])
            answers.append(float((sides[0] == better) != (flipped < FLIPPED)))
            groups.append(number)
    ids = tuple(map(str, range(len(pairs))))
    return VoteSet(torch.stack(pairs), torch.tensor(answers), ids, "sd15", "demo", "", 0, tuple(groups))


def head_of(work: Path, host: HeadlessHost, taste: str) -> TasteHead:
    path = work / f"{taste}.safetensors"
    if not path.exists():
        votes = vote_set(make_votes(work, host), taste)
        with torch.enable_grad():
            fitted = fit_taste(votes, name=taste)
        (work / f"{taste}.txt").write_text(fitted.report.text() + "\n")
        save_taste(fitted.head, path)
    head = load(path)
    assert isinstance(head, TasteHead)
    return head


# ---------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Way:
    """How pictures are made: "base", "steer" with a strength or "choose" with a number of candidates."""

    how: str
    amount: float = 0.0

    @property
    def name(self) -> str:
        return self.how if self.how == "base" else f"{self.how}_{self.amount:g}"


WAYS = (*(Way("steer", strength) for strength in STRENGTHS), *(Way("choose", count) for count in CANDIDATES))


def sample(
    host: HeadlessHost, head: TasteHead | None, way: Way, prompts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """[B, 4, 8, 8] final latents."""
    arguments, draws = host.arguments(prompts), SeededDraws(seeds)
    model = host.denoiser if head is None else steered(host.denoiser, Steering(head, way.amount))
    settings = {"draws": draws, "alphas_cumprod": host.alphas_cumprod, "eta": 1.0}
    x = draws.initial((4, 8, 8)) * (1 + host.sigmas[0] ** 2).sqrt()
    if way.how == "choose" and head is not None:
        return sample_best(
            partial(host.denoiser, **arguments), x, host.sigmas,
            preference=head, prompts=prompts, candidates=int(way.amount), **settings,
        )  # fmt: skip
    plain = RolloutSettings(candidates=1, eta=1.0)
    return sample_spo(
        model, x, host.sigmas, arguments, settings=plain, draws=draws, alphas_cumprod=host.alphas_cumprod
    ).x  # fmt: skip


def pictures(work: Path, host: HeadlessHost, head: TasteHead | None, taste: str, way: Way) -> Tensor:
    """[64, 3, 64, 64] in [-1, 1], kept in FOLDER."""
    path = work / (f"{way.name}.safetensors" if head is None else f"{taste}_{way.name}.safetensors")
    if not path.exists():
        prompts, seeds = held_out()
        host.prepare(prompts)
        parts = [slice(first, first + BATCH) for first in range(0, len(prompts), BATCH)]
        latents = [sample(host, head, way, prompts[part], seeds[part]) for part in parts]
        pixels = torch.cat([host.decode(one).clamp(-1, 1) for one in latents])
        write_whole(path, lambda temporary: save_file({"pixels": pixels.contiguous()}, temporary))
    return load_file(path)["pixels"]


def seconds(work: Path, host: HeadlessHost, head: TasteHead) -> dict[str, float]:
    """Least CPU seconds of three to sample 8 pictures, by way; turn by turn, so that all meet the same machine."""
    path = work / "seconds.json"
    if not path.exists():
        prompts, seeds = (values[:8] for values in held_out())
        host.prepare(prompts)
        ways = {
            "base": Way("base"),
            "steer": Way("steer", 1.0),
            **{f"choose_{k}": Way("choose", k) for k in CANDIDATES},
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(3):
            for name, way in ways.items():
                began = time.process_time()
                sample(host, None if name == "base" else head, way, prompts, seeds)
                times[name].append(time.process_time() - began)
        path.write_text(json.dumps({name: min(values) for name, values in times.items()}, indent=1) + "\n")
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Row:
    """One line of the table. wins, low, high: by the taste's rule against the same prompt and seed without the head;
    kept: subjects recognised; rule_value: its mean; drift: mean absolute difference of pixels in [-1, 1]; time: base 1.
    """

    taste: str
    how: str
    amount: float
    wins: float
    low: float
    high: float
    kept: float
    rule_before: float
    rule_value: float
    drift: float
    time: float


def row_of(taste: str, way: Way, base: Tensor, pixels: Tensor, times: Mapping[str, float], judge: Judge) -> Row:
    before, after = rule_of(taste, base), rule_of(taste, pixels)
    wins = win_rate(after.tolist(), before.tolist())
    kept = judge.judge(pixels, held_out()[0]).recognised_share
    cost = times["steer" if way.how == "steer" else way.name] / times["base"]
    return Row(
        taste, way.how, way.amount, wins.rate, wins.low, wins.high, kept, float(before.mean()), float(after.mean()),
        float((pixels - base).abs().mean()), cost,
    )  # fmt: skip


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Wins and kept subjects against strength, one panel for each taste."""
    from matplotlib.figure import Figure

    tastes = list(dict.fromkeys(row.taste for row in rows))
    figure = Figure(figsize=(4.4 * len(tastes), 3.9), dpi=110, facecolor="white")
    for number, taste in enumerate(tastes):
        axes = figure.add_subplot(1, len(tastes), number + 1)
        steer = [row for row in rows if row.taste == taste and row.how == "steer"]
        x = [0.0, *(row.amount for row in steer)]
        axes.fill_between(x, [0.5, *(row.low for row in steer)], [0.5, *(row.high for row in steer)], color="#cfe0f3")
        axes.plot(x, [0.5, *(row.wins for row in steer)], "o-", color="#1b4f9c", label="wins by the rule (95 %)")
        axes.plot(x, [1.0, *(row.kept for row in steer)], "s--", color="#c0392b", label="subjects recognised")
        axes.axvspan(2, max(x), color="#f2f4f7", zorder=0)
        axes.set_title(f"{taste} is preferred", loc="left", fontsize=12)
        axes.set_xlabel("strength (grey: beyond the slider)")
        axes.set_ylim(0.2, 1.03)
        axes.grid(True, color="#e4e7ec")
        if number == 0:
            axes.legend(fontsize=8.5, loc="lower left", frameon=False)
    figure.tight_layout()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw_grid(work: Path, host: HeadlessHost, tastes: Sequence[str], path: Path, columns: int = 9) -> None:
    """Held-out prompts: without, and at the strengths of `SHOWN`, with the rule's value under each picture."""
    prompts, _ = held_out()
    rows, labels, captions = [], [], []
    for taste in tastes:
        head = head_of(work, host, taste)
        for way in (Way("base"), *(Way("steer", strength) for strength in SHOWN)):
            pixels = pictures(work, host, None if way.how == "base" else head, taste, way)[:columns]
            rows.append([to_picture(picture) for picture in pixels])
            labels.append(f"{taste}, {way.amount:g}" if way.how == "steer" else "0")
            percent = taste == "large"
            values = rule_of(taste, pixels).abs().tolist()
            captions.append([f"covers {value:.0%}" if percent else f"colour {value:.0f}" for value in values])
    made = grid(
        rows, labels, prompts[:columns], captions, title="steered after 60 votes of simulated voters, 10 % flipped"
    )
    write_whole(path, lambda temporary: made.reduce(2).save(temporary, "PNG"))


def measure(work: Path, tastes: Sequence[str], report: Callable[[str], object] = print) -> list[Row]:
    host, judge, rows = load_host(demo_config(work)), Judge(), []
    base = pictures(work, host, None, "", Way("base"))
    for taste in tastes:
        head = head_of(work, host, taste)
        times = seconds(work, host, head)
        for way in WAYS:
            rows.append(row_of(taste, way, base, pictures(work, host, head, taste, way), times, judge))
            report(json.dumps(asdict(rows[-1])))
    draw_grid(work, host, tastes[:2], ROOT / "docs" / "taste_slider_grid.png")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tastes", nargs="+", choices=TASTES, default=TASTES)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = measure(options.work, options.tastes)
    write_csv(ROOT / "docs" / "taste_slider.csv", [asdict(row) for row in rows])
    draw_curves(rows, ROOT / "docs" / "taste_slider.png")


if __name__ == "__main__":
    main()
