"""The best of several LoRAs and weights, by a judge that training did not follow; and a LoRA scaled to its best weight.

The choice goes by the rule for the stages of a run (see `stages`): a column of an evaluation stands for a check, the
base's for that at update 0. So a weight that costs adherence or diversity is out, however well the judge likes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spo.errors import SpoError
from spo.evaluation.features import Features
from spo.evaluation.interval import Interval
from spo.evaluation.judges import Judge
from spo.evaluation.measures import diversity
from spo.evaluation.provenance import FOLLOWED, Training, role
from spo.evaluation.statistics import Measured
from spo.lora.read import LoraFile, read_lora
from spo.lora.write import write_lora
from spo.training.stages import Check, gain, lost, mean


@dataclass(frozen=True)
class Choice:
    """label: of the best column, "" where all are out; gain: of the judge's score against the base's; out: column ->
    what it lost, and its share."""

    judge: str
    label: str
    gain: Interval | None
    out: Mapping[str, Mapping[str, Interval]]

    def text(self) -> str:
        """In sentences."""
        dropped = ""
        for label, shares in self.out.items():
            what = " and ".join(f"{share.mean:.0%} of the {name}" for name, share in shares.items())
            dropped += f" {label} is out: it lost {what}."
        if self.gain is None:
            return f"None is best by {self.judge}.{dropped}"
        certain = "" if self.gain.low > 0 else " That is no certain gain."
        return f"Best by {self.judge}: {self.label}, {self.gain.text('+.3g')} against the base.{certain}{dropped}"


def choosing_judge(judges: Sequence[Judge], trainings: Sequence[Training]) -> Judge | None:
    """The first of the judges that says which picture is better and that none of the LoRAs' trainings followed."""
    return next((judge for judge in judges if judge.prefers and role(judge.name, trainings) != FOLLOWED), None)


def best_column(
    columns: Mapping[str, Measured],
    prompts: Sequence[str],
    judge: Judge,
    judges: Sequence[Judge],
    features: Features,
) -> Choice:
    """The column with the judge's highest mean score, of those that lost neither adherence nor diversity.

    columns  the first is the base, whose `chance` is needed; row i of each has prompt i
    judges   all of them; the first that measures adherence measures what is lost of it
    """
    adherence = next((one for one in judges if one.adherence), None)
    base, *others = columns
    checks = {label: _check(measured, prompts, judge, adherence, features) for label, measured in columns.items()}
    out = {label: shares for label in others if (shares := lost(checks[label], checks[base]))}
    good = [label for label in others if label not in out]
    if not good:
        return Choice(judge.name, "", None, out)
    best = max(good, key=lambda label: mean(checks[label].judge))
    return Choice(judge.name, best, gain(checks[best], checks[base], "judge"), out)


def _check(
    measured: Measured, prompts: Sequence[str], judge: Judge, adherence: Judge | None, features: Features
) -> Check:
    def by_prompt(values: Tensor) -> tuple[float, ...]:
        of = {prompt: [row for row, other in enumerate(prompts) if other == prompt] for prompt in prompts}
        return tuple(float(values[rows].double().mean()) for rows in of.values())

    def shown(scores: Tensor) -> Tensor:
        assert adherence is not None
        # of one picture that shows something else the logarithm can be as low as it likes
        return scores.exp() if adherence.adherence == "log-probability" else adherence.adherence_of(scores)

    chance = measured.chance.get(adherence.name) if adherence else None
    several = len(set(prompts)) < len(prompts)
    return Check(
        0,
        score=(),
        judge=by_prompt(measured.scores[judge.name]),
        adherence=by_prompt(shown(measured.scores[adherence.name])) if adherence else (),
        chance=() if chance is None else by_prompt(shown(chance)),
        diversity=tuple(diversity(measured.features, prompts, features.distance).tolist()) if several else (),
    )


def scalable(path: Path, output: Path) -> LoraFile:
    """The LoRA in the file. SpoError when it could not be scaled into `output`: which exists, or has no folder, or the
    LoRA changes text encoders too, which are not read."""
    if output.suffix != ".safetensors":
        raise SpoError(f'"{output.name}" is not a name for a LoRA file; it has to end in .safetensors.')
    if output.exists():
        raise SpoError(f'"{output}" exists already, and is not replaced; choose another name for the scaled LoRA.')
    if not output.absolute().parent.is_dir():
        raise SpoError(f'the folder "{output.parent}" does not exist; make it or choose another one.')
    file = read_lora(path)
    if file.text_encoder_layers:
        raise SpoError(
            f'"{path.name}" changes the text encoder, too, whose layers would be left out; scale it with a tool that '
            "knows them."
        )
    return file


def write_scaled(file: LoraFile, weight: float, output: Path) -> None:
    """A LoRA file that does at weight 1 what `file` does at `weight`: every alpha times that, the weights as they are.

    Raises SpoError as `write_lora` does; an existing file is never replaced.
    """
    layers = {name: replace(layer, alpha=weight * layer.alpha) for name, layer in file.layers.items()}
    own = {name: text for name, text in file.metadata.items() if not name.startswith("sshs_")}
    titles = {name: output.stem for name in ("ss_output_name", "modelspec.title")}
    alphas = {layer.alpha for layer in layers.values()}
    alpha = {"ss_network_alpha": str(alphas.pop())} if len(alphas) == 1 else {}
    scaled = {"spo_scaled_from": file.path.stem, "spo_scaled_by": f"{weight:g}"}
    write_lora(output, layers, {**own, **titles, **alpha, **scaled}, dtype=getattr(torch, file.dtype))
