"""A weighted mix of preference models.

    score = scale * sum(weight_i / deviation_i * score_i),  weights normalized to the sum 1,  scale = deviation_1

Selection takes the softmax of a pool's best and worst score, so the *size* of differences decides what is kept. That
is why nothing is normalized within a pool: it would make a pool of near equals look like one with a clear winner. The
deviations are fixed numbers in the mix's description, so a score depends on no other pool and a resumed run ends the
same; `measured` finds them. `scale` gives the mix the size of its first model's differences, so a threshold chosen for
that model keeps its meaning, and a mix of one model is that model.

Without deviations all are 1: right for models whose differences are log-odds (the step-aware CLIP, PickScore, HPS),
wrong beside an aesthetic score, which is in points of a rating.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.algorithm.preference import Candidates, PreferenceModel
from spo.errors import SpoError, nearest
from spo.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".json", ".yaml", ".yml")
_TERM = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*\*\s*(.+?)\s*")
_KEYS = ("file", "weight", "deviation")


@dataclass(frozen=True)
class MixPart:
    """One model of a mix: its file (or "demo"), its weight, and the usual deviation of its scores within a pool."""

    file: str
    weight: float
    deviation: float = 1.0


@dataclass(frozen=True)
class PoolScoresOfModel:
    """What one model says of several pools: scores [K, B] of each."""

    pools: Sequence[Tensor]


class MixedScore:
    """A `PreferenceModel` over several; see the module's text for the formula.

    models  one for each of `parts`, in that order
    """

    def __init__(self, parts: Sequence[MixPart], models: Sequence[PreferenceModel], name: str) -> None:
        self.parts, self.models, self.name = tuple(parts), tuple(models), name
        self.needs_pixels = any(model.needs_pixels for model in models)
        self.needs_denoised = any(model.needs_denoised for model in models)

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32; see `PreferenceModel`. The pictures are decoded once for all models."""
        total = sum(part.weight for part in self.parts)
        scale = self.parts[0].deviation / total
        scores = [
            scale * part.weight / part.deviation * model.score(candidates, prompts).to(candidates.x.device)
            for part, model in zip(self.parts, self.models, strict=True)
        ]
        return sum(scores[1:], scores[0])


def is_mix(text: str) -> bool:
    """Whether a name means a mix: "0.7*a.safetensors + 0.3*b.safetensors", or a .json or .yaml file of one."""
    return Path(text).suffix.lower() in SUFFIXES or _TERM.fullmatch(text.split(" + ")[0]) is not None


def read_mix(text: str) -> tuple[MixPart, ...]:
    """The parts of a mix from its text, or from its file, where relative names start from the file's folder.

        {"models": [{"file": "spm.bin", "weight": 0.7, "deviation": 1.3}, {"file": "hps.pt", "weight": 0.3}]}

    Raises SpoError for what is no mix, with unknown keys, or with weights or deviations that are not above 0.
    """
    if Path(text).suffix.lower() in SUFFIXES and _TERM.fullmatch(text.split(" + ")[0]) is None:
        return _from_file(Path(text).expanduser())
    parts = []
    for term in text.split(" + "):
        match = _TERM.fullmatch(term)
        if match is None:
            raise SpoError(f'"{term}" is no part of a mix; accepted is "0.7*a.safetensors + 0.3*b.safetensors".')
        parts.append(_checked({"file": match[2], "weight": float(match[1])}, f'the mix "{text}"', Path()))
    return tuple(parts)


def models_of(name: str) -> list[str]:
    """The preference models that a name stands for: of a mix its models, by their names or files, in its order; else
    the name itself, and so of a mix that cannot be read."""
    with suppress(SpoError):
        return [part.file for part in read_mix(name)] if is_mix(name) else [name]
    return [name]


def write_mix(path: Path, parts: Sequence[MixPart]) -> None:
    """Write the JSON that `read_mix` reads, whole or not at all."""
    models = [{"file": part.file, "weight": part.weight, "deviation": part.deviation} for part in parts]
    write_text(path, json.dumps({"models": models}, indent=2) + "\n")


def measured(parts: Sequence[MixPart], scores: Sequence[PoolScoresOfModel]) -> tuple[MixPart, ...]:
    """The parts with deviations measured on some pools (a hundred are plenty), to be written down once.

    scores  what each part's model says of the same pools. A deviation is the root of the mean over pools and images of
            the candidates' variance: pools of near equals count little, as they should

    Raises SpoError when a model says the same of all candidates everywhere.
    """
    scaled = []
    for part, of_part in zip(parts, scores, strict=True):
        variances = [pool.float().var(0, unbiased=True).flatten() for pool in of_part.pools]
        deviation = math.sqrt(sum(float(v.sum()) for v in variances) / sum(len(v) for v in variances))
        if not deviation > 0 or not math.isfinite(deviation):
            raise SpoError(f'"{part.file}" gives all candidates of a pool the same score, so it cannot be in a mix.')
        scaled.append(replace(part, deviation=deviation))
    return tuple(scaled)


def _from_file(path: Path) -> tuple[MixPart, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpoError(f'the mix "{path}" cannot be read ({error}).') from error
    try:
        content = json.loads(text) if path.suffix.lower() == ".json" else _yaml(text)
    except ValueError as error:
        raise SpoError(f'the mix "{path.name}" is not valid {path.suffix[1:].upper()} ({error}).') from error
    models = content.get("models") if isinstance(content, dict) else None
    if not isinstance(models, list) or not models:
        raise SpoError(f'"{path.name}" is no mix of preference models: a list "models" of file and weight is needed.')
    return tuple(_checked(entry, f'the mix "{path.name}"', path.parent) for entry in models)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _checked(entry: Any, source: str, folder: Path) -> MixPart:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or "weight" not in entry:
        raise SpoError(f"{source} has the entry {entry!r}; accepted is a file, a weight and perhaps a deviation.")
    for key in entry:
        if key not in _KEYS:
            raise SpoError(f'{source} has the key "{key}"{nearest(str(key), _KEYS)}; accepted are {", ".join(_KEYS)}.')
    for key in ("weight", "deviation"):
        value = entry.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SpoError(f"{source} has the {key} {value!r}; accepted are numbers above 0.")
    name = entry["file"]
    if Path(name).suffix.lower() in SUFFIXES:
        raise SpoError(f'{source} has the part "{name}", a mix itself; accepted are files of preference models.')
    file = name if name == "demo" or Path(name).expanduser().is_absolute() else str(folder / name)
    return MixPart(file, float(entry["weight"]), float(entry.get("deviation", 1.0)))


def mix_name(parts: Iterable[MixPart]) -> str:
    """ "0.7*spm + 0.3*hps": how the interface and the file metadata call a mix."""
    return " + ".join(f"{part.weight:g}*{part.file if part.file == 'demo' else Path(part.file).stem}" for part in parts)
