"""The table: every statistic of base and LoRA, their differences, and what stands in for the bootstrap."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spo.evaluation.features import pixel_features
from spo.evaluation.interval import bootstrap_interval
from spo.evaluation.judges import Judge
from spo.evaluation.measures import colourfulness
from spo.evaluation.statistics import Measured, drifts_of, measure, statistics, together
from spo.report.win_rate import wilson_interval
from tests.tiny_host import MeanOfChannel

PROMPTS = ["a", "a", "b", "b", "c", "c"]
JUDGE = Judge("mean", MeanOfChannel(scale=1.0))
WORD = Judge("word", MeanOfChannel(scale=2.0), "log-probability", prefers=False)


def table_of(columns, prompts, judges):
    return statistics(columns, prompts, judges, pixel_features(), drifts_of(columns, pixel_features()))


def column(seed, shift=0.0):
    draws = torch.Generator().manual_seed(seed)
    pixels, latents = torch.rand(6, 3, 16, 16, generator=draws) * 2 - 1, torch.randn(6, 4, 2, 2, generator=draws)
    return pixels, latents + shift


def measured(pixels, latents, rows=slice(None)):
    return measure(pixels[rows], latents[rows], PROMPTS[rows], [JUDGE, WORD], pixel_features())


def test_every_row_of_the_table():
    base, lora = column(0), column(1, shift=0.3)
    columns = {"base": measured(*base), "lora": measured(*lora)}
    rows = {(row.name, row.by): row for row in table_of(columns, PROMPTS, [JUDGE, WORD])}
    by = pixel_features().name
    assert list(rows) == [
        ("wins", "mean"), ("score", "mean"), ("adherence", "word"), ("diversity", by), ("drift", by),
        ("colourfulness", ""), ("saturation", ""), ("contrast", ""),
    ]  # fmt: skip
    first, second = (side[1][:, 0].mean((1, 2)) for side in (base, lora))
    score = rows["score", "mean"].values
    assert score["base"].difference is None
    assert score["lora"].of == bootstrap_interval(second, PROMPTS)
    assert score["lora"].difference == bootstrap_interval(second - first, PROMPTS)
    assert rows["wins", "mean"].values["lora"].of.mean == pytest.approx(float((second > first).float().mean()))
    assert "base" not in rows["wins", "mean"].values and "base" not in rows["drift", by].values
    assert rows["adherence", "word"].unit == "log-probability"
    assert rows["colourfulness", ""].values["base"].of.mean == pytest.approx(float(colourfulness(base[0]).mean()))
    drift = ((base[0] - lora[0]).square().mean((1, 2, 3)).sqrt() / 2).mean()
    assert rows["drift", by].values["lora"].of.mean == pytest.approx(float(drift), rel=1e-3)
    pairs = (base[0][::2] - base[0][1::2]).square().mean((1, 2, 3)).sqrt() / 2
    assert rows["diversity", by].values["base"].of.mean == pytest.approx(float(pairs.mean()), rel=1e-3)


def test_portions_are_the_whole():
    pixels, latents = column(0)
    whole = measured(pixels, latents)
    parts = together([measured(pixels, latents, rows) for rows in (slice(0, 4), slice(4, 6))])
    assert torch.equal(parts.features, whole.features)
    torch.testing.assert_close(parts.scores["mean"], whole.scores["mean"])
    torch.testing.assert_close(parts.colours["contrast"], whole.colours["contrast"])


def test_where_every_picture_wins_wilsons_interval_over_prompts_stands_in():
    pixels, latents = column(0)
    columns = {"base": measured(pixels, latents), "lora": measured(pixels, latents + 1)}
    wins = table_of(columns, PROMPTS, [JUDGE])[0].values["lora"].of
    assert (wins.mean, wins.low, wins.high) == (1.0, *wilson_interval(1.0, 3))


def test_ties_count_half_and_one_seed_has_no_diversity():
    base = Measured({name: torch.zeros(3) for name in ("colourfulness", "saturation", "contrast")},
                    {"mean": torch.zeros(3)}, torch.zeros(3, 5))  # fmt: skip
    rows = table_of({"base": base, "same": base}, ["a", "b", "c"], [JUDGE])
    assert rows[0].values["same"].of.mean == 0.5
    assert "diversity" not in [row.name for row in rows]


def test_recognised_subjects_are_a_share_of_their_own():
    seen = {"base": [1, 1, 1, 1, 1, 1], "lora": [1, 0, 1, 1, 1, 1]}
    columns = {
        label: dataclasses.replace(measured(*column(0)), recognised={"word": torch.tensor(values).float()})
        for label, values in seen.items()
    }
    row = next(row for row in table_of(columns, PROMPTS, [JUDGE, WORD]) if row.name == "recognised")
    assert row.by == "word" and row.values["lora"].of.mean == pytest.approx(5 / 6)
    assert row.values["lora"].difference.mean == pytest.approx(-1 / 6)
    assert (row.values["base"].of.low, row.values["base"].of.high) == wilson_interval(1.0, len(set(PROMPTS)))
