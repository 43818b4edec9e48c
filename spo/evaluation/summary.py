"""An evaluation in whole: what was measured of each column, put together with what is known of the LoRAs' training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spo.evaluation.features import Features
from spo.evaluation.judges import Judge
from spo.evaluation.provenance import CHOSE, FOLLOWED, UNKNOWN, UNSEEN, Training, role
from spo.evaluation.statistics import Measured, Statistic, drifts_of, statistics

FEW_PROMPTS = 10
FIRST_SEED = 1000  # of evaluated pictures, where seeds are not given


def rows_of(prompts: Sequence[str], seeds: Sequence[int], each: int = 0) -> list[tuple[str, int]]:
    """(prompt, seed) of the rows: each prompt with each of `seeds`, or without these with `each` seeds of its own."""
    own = [[FIRST_SEED + row * each + n for n in range(each)] for row in range(len(prompts))]
    return [(prompt, seed) for row, prompt in enumerate(prompts) for seed in seeds or own[row]]


@dataclass(frozen=True)
class Column:
    """The base, or a LoRA at a weight: what was measured of its N pictures, and the pictures themselves as WebP."""

    measured: Measured
    pictures: Sequence[bytes]


@dataclass(frozen=True)
class JudgeColumn:
    """What one judge says: its role (see `provenance.role`), and column -> a score for each row."""

    name: str
    role: str
    scores: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Evaluation:
    """All that a page shows.

    facts      label -> text, in words for people: checkpoint, prompts, how pictures were drawn
    remarks    whole sentences that a reader must know first
    columns    the base's label, then those of the LoRAs
    prompts, seeds  of the rows
    pictures   column -> a picture for each row, WebP
    drifts     column, without the base -> distance from the base's picture, for each row
    """

    title: str
    facts: Mapping[str, str]
    remarks: Sequence[str]
    columns: Sequence[str]
    statistics: Sequence[Statistic]
    judges: Sequence[JudgeColumn]
    prompts: Sequence[str]
    seeds: Sequence[int]
    pictures: Mapping[str, Sequence[bytes]]
    drifts: Mapping[str, Sequence[float]]


def summarize(
    title: str,
    facts: Mapping[str, str],
    columns: Mapping[str, Column],
    prompts: Sequence[str],
    seeds: Sequence[int],
    judges: Sequence[Judge],
    features: Features,
    trainings: Sequence[Training],
) -> Evaluation:
    """All columns as one evaluation; the first is the base, row i of each has prompt i and seed i.

    facts      of the checkpoint and how pictures were drawn, in words; those on prompts and judges are added
    trainings  of the LoRAs
    """
    measured = {label: column.measured for label, column in columns.items()}
    drifts = drifts_of(measured, features)
    roles = {judge.name: role(judge.name, trainings) for judge in judges}
    own = {
        "Prompts": f"{len(set(prompts))}, {len(prompts)} pictures in each column",
        "Seeds": f"{min(seeds)} to {max(seeds)}, the same in each column",
        "Judges": ", ".join(f"{name} ({roles[name]})" for name in roles) or "none",
        "Distance of pictures": features.name,
    }
    return Evaluation(
        title=title,
        facts={**facts, **own},
        remarks=remarks(roles, prompts, trainings),
        columns=list(columns),
        statistics=statistics(measured, prompts, judges, features, drifts),
        judges=[
            JudgeColumn(
                judge.name, roles[judge.name], {label: of.scores[judge.name].tolist() for label, of in measured.items()}
            )
            for judge in judges
        ],
        prompts=prompts,
        seeds=seeds,
        pictures={label: column.pictures for label, column in columns.items()},
        drifts={label: far.tolist() for label, far in drifts.items()},
    )


def remarks(roles: Mapping[str, str], prompts: Sequence[str], trainings: Sequence[Training]) -> list[str]:
    """What a reader must know first, in whole sentences: judges that training followed, prompts that it knew."""
    said, own = [], set(prompts)
    if not {UNSEEN, CHOSE} & set(roles.values()):
        said.append(
            "No judge here is known to be one that training never saw. A score that training raised says little by "
            "itself: add another judge."
        )
    followed, chose = ([name for name, part in roles.items() if part == which] for which in (FOLLOWED, CHOSE))
    if followed:
        rises = "its score rises" if len(followed) == 1 else "their scores rise"
        names = ", ".join(followed)
        said.append(f"Training followed {names}: that {rises} is what training did, not yet that it helped.")
    if chose:
        flatters = "it: its score flatters" if len(chose) == 1 else "them: their scores flatter"
        names = ", ".join(chose)
        said.append(f"Training did not follow {names}, but chose its best stage by {flatters} a little.")
    if UNKNOWN in roles.values():
        said.append("A LoRA does not say what it was trained on, so that a judge may be what it followed.")
    trained = own & frozenset[str]().union(*(training.prompts for training in trainings))
    if trained:
        said.append(f"{len(trained)} of {len(own)} prompts were trained on; held-out ones tell more.")
    if len(own) < FEW_PROMPTS:
        said.append(f"{len(own)} prompts are few: intervals over fewer than {FEW_PROMPTS} come out too narrow.")
    return said
