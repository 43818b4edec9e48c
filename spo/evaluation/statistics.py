"""What base and LoRAs are like, and how much they differ, by all measures and judges, with intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spo.evaluation.features import Features
from spo.evaluation.interval import Interval, bootstrap_interval
from spo.evaluation.judges import Judge
from spo.evaluation.measures import colourfulness, contrast, diversity, drift, saturation
from spo.report.win_rate import wilson_interval

COLOURS = {"colourfulness": colourfulness, "saturation": saturation, "contrast": contrast}


@dataclass(frozen=True)
class Measured:
    """What is left of N pictures of one column: numbers.

    colours     name of `COLOURS` -> [N]; scores: judge's name -> [N]; features: [N, D], see `Features`
    recognised  name of a judge that tells subjects apart -> [N] 0 or 1, whether it finds the prompt's
    chance      name of a judge of adherence -> [N] its scores for other prompts; empty where nobody asked
    """

    colours: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    features: Tensor
    recognised: Mapping[str, Tensor] = field(default_factory=dict)
    chance: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """One statistic of one column: of itself, and how much it differs from the base's (None for the base's own)."""

    of: Interval
    difference: Interval | None


@dataclass(frozen=True)
class Statistic:
    """One row of the table.

    name    "wins", "score", "adherence", "recognised", "diversity", "drift" or one of `COLOURS`
    by      the judge, or what pictures were compared by; "" for colours
    unit    where it is not clear from the name
    values  column -> its value; without the base where there is nothing to say of it
    """

    name: str
    by: str
    values: Mapping[str, Value]
    unit: str = ""


def measure(
    pixels: Tensor,
    latents: Tensor,
    prompts: Sequence[str],
    judges: Sequence[Judge],
    features: Features,
    others: Sequence[str] = (),
) -> Measured:
    """Measure N finished pictures [N, 3, H, W] in [-1, 1], decoded from latents [N, 4, h, w], of N prompts.

    others  N other prompts, where it shall be known how well the pictures show these
    """
    subjects = {judge.name: judge.recognised(pixels, prompts) for judge in judges}
    return Measured(
        colours={name: of(pixels).cpu() for name, of in COLOURS.items()},
        scores={judge.name: judge.scores(pixels, latents, prompts) for judge in judges},
        features=features.of(pixels),
        recognised={name: found.float() for name, found in subjects.items() if found is not None},
        chance={j.name: j.scores(pixels, latents, others) for j in judges if j.adherence} if others else {},
    )


def together(parts: Sequence[Measured]) -> Measured:
    """Portions of one column as one."""

    def joined(of: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in of]) for name in of[0]}

    return Measured(
        colours=joined([part.colours for part in parts]),
        scores=joined([part.scores for part in parts]),
        features=torch.cat([part.features for part in parts]),
        recognised=joined([part.recognised for part in parts]),
        chance=joined([part.chance for part in parts]),
    )


def statistics(
    columns: Mapping[str, Measured],
    prompts: Sequence[str],
    judges: Sequence[Judge],
    features: Features,
    drifts: Mapping[str, Tensor],
) -> list[Statistic]:
    """The table's rows. The first of `columns` is the base; row i of all of them has the same prompt and seed.

    prompts  of the N pictures; equal ones are drawn together by the bootstrap
    drifts   column, without the base -> [N], see `drifts_of`
    """
    base, *others = columns
    rows: list[Statistic] = []
    for judge in judges:
        scores = {label: column.scores[judge.name] for label, column in columns.items()}
        if judge.prefers:
            wins = {label: Value(_win_rate(scores[label], scores[base], prompts), None) for label in others}
            rows.append(Statistic("wins", judge.name, wins))
            rows.append(Statistic("score", judge.name, _values(scores, prompts)))
        if judge.adherence:
            adherence = {label: judge.adherence_of(of) for label, of in scores.items()}
            rows.append(Statistic("adherence", judge.name, _values(adherence, prompts), judge.adherence))
        if judge.name in columns[base].recognised:
            found = {label: column.recognised[judge.name] for label, column in columns.items()}
            rows.append(Statistic("recognised", judge.name, _values(found, prompts, _share)))
    if len(set(prompts)) < len(prompts):
        varied = {label: diversity(column.features, prompts, features.distance) for label, column in columns.items()}
        rows.append(Statistic("diversity", features.name, _values(varied, list(dict.fromkeys(prompts)))))
    values = {label: Value(bootstrap_interval(of, prompts), None) for label, of in drifts.items()}
    rows.append(Statistic("drift", features.name, values))
    for name in COLOURS:
        rows.append(
            Statistic(name, "", _values({label: column.colours[name] for label, column in columns.items()}, prompts))
        )
    return rows


def drifts_of(columns: Mapping[str, Measured], features: Features) -> dict[str, Tensor]:
    """Column, without the base -> [N] float32, each picture's distance from the base's."""
    base, *others = columns.values()
    far = [drift(base.features, other.features, features.distance).float() for other in others]
    return dict(zip(list(columns)[1:], far, strict=True))


def _values(
    of: Mapping[str, Tensor],
    prompts: Sequence[str],
    interval: Callable[[Tensor, Sequence[str]], Interval] = bootstrap_interval,
) -> dict[str, Value]:
    """Each column's mean with its interval, and that of its difference from the first, picture by picture."""
    base, values = next(iter(of)), {}
    for label, column in of.items():
        difference = None if label == base else bootstrap_interval(column - of[base], prompts)
        values[label] = Value(interval(column, prompts), difference)
    return values


def _win_rate(scores: Tensor, base: Tensor, prompts: Sequence[str]) -> Interval:
    """Share of pictures that score above the base's, ties counting half."""
    return _share((scores > base).float() + (scores == base).float() / 2, prompts)


def _share(values: Tensor, prompts: Sequence[str]) -> Interval:
    """The mean of values from 0 to 1.

    Where all prompts agree, as when every picture wins, the bootstrap has nothing to draw from, and Wilson's interval
    for as many prompts stands in.
    """
    rate = bootstrap_interval(values, prompts)
    if math.isfinite(rate.low) and rate.low == rate.high:
        return Interval(rate.mean, *wilson_interval(rate.mean, len(set(prompts))))
    return rate
