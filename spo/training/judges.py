"""Which models judge the stages of a run: those configured, or, by "auto", others that lie beside the one trained on.

A judge must be a model that training does not follow: what is followed is what learns to be cheated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from spo.checkpoint.tensor_file import open_tensor_file
from spo.config import Config
from spo.errors import SpoError
from spo.evaluation.judges import Judge, load_judge
from spo.preference.load import (
    BUNDLED,
    BUNDLED_FILES,
    DEMO_CHECKPOINTS,
    MIX,
    PreferenceInfo,
    describe_preference,
    fingerprint,
    list_preference_models,
)
from spo.preference.mix import is_mix, models_of, read_mix
from spo.preference.pickles import TWIN_SUFFIX
from spo.preference.subject_score import subjects_in
from spo.training.host import Host
from spo.training.validation import Judges, prompts_of_checks

AUTO, NONE = "auto", "none"
DEMO = {"judge": "demo-judge", "adherence": "demo-adherence"}
# Kinds whose taste is everybody's, in the order in which they are taken. A head fitted to one's own votes is neither
# judged by these, which know another taste, nor a judge of theirs.
_TASTE_OF_MANY = ("CLIP score", "step-aware CLIP", "aesthetic score")
_KNOWS_PROMPTS = ("CLIP score",)
_DOES = {"judge": "Stages are judged by", "adherence": "Adherence to prompts is measured by"}


def with_judges(config: Config, architecture: str, prompts: Sequence[str]) -> Config:
    """The configuration with names in place of "auto"; "" where there is nobody, or nothing is to be checked.

    prompts  those of training
    """
    wanted = config.validation
    names = {"judge": wanted.judge, "adherence": wanted.adherence}
    if not wanted.validate_every:
        names = dict.fromkeys(names, NONE)
    preference = config.preference.preference
    followed = models_of(preference)
    if followed[0] == BUNDLED and Path(config.model.checkpoint).stem in DEMO_CHECKPOINTS:
        others_of_demo = {role: NONE if name in followed else name for role, name in DEMO.items()}
        names = {role: others_of_demo[role] if name == AUTO else name for role, name in names.items()}
        subjects = subjects_in(open_tensor_file(BUNDLED_FILES[DEMO["adherence"]]))
        if wanted.adherence == AUTO and not set(prompts_of_checks(config, prompts)) <= set(subjects):
            names["adherence"] = NONE
    if AUTO in names.values():
        others = _others(preference, architecture)
        if names["judge"] == AUTO:
            many = others and _kind(preference) in (*_TASTE_OF_MANY, MIX)
            names["judge"] = _first(others, _TASTE_OF_MANY) if many else NONE
        if names["adherence"] == AUTO:
            others = [info for info in others if str(info.path) != names["judge"]]
            names["adherence"] = _first(others, _KNOWS_PROMPTS)
    judge, adherence = ("" if names[role] == NONE else names[role] for role in DEMO)
    return replace(config, validation=replace(wanted, judge=judge, adherence=adherence))


def load_judges(config: Config, host: Host, say: Callable[[str], object]) -> Judges:
    """The judges of a configuration that `with_judges` made. They rest on the CPU between checks.

    Raises SpoError for a judge that is the preference model itself, and as `load_judge`.
    """
    loaded: dict[str, Judge | None] = {"judge": None, "adherence": None}
    for role in loaded:
        name = getattr(config.validation, role)
        if name in ("", AUTO, NONE):
            continue
        if role == "judge" and set(_parts(name)) & set(_parts(config.preference.preference)):
            raise SpoError(
                f'judge is "{name}", which training follows: it would praise what training learns to please it with; '
                f"choose another model, or {NONE}."
            )
        say(f"{_DOES[role]} {Path(name).name}.")
        loaded[role] = load_judge(
            name,
            host.device,
            host.architecture,
            checkpoint_name=host.checkpoint_name,
            precision=config.preference.preference_precision,
            rest_on_cpu=True,
        )
    return Judges(loaded["judge"], loaded["adherence"])


def _others(preference: str, architecture: str) -> list[PreferenceInfo]:
    """The models beside the one trained on that fit the architecture, without those that it is or is made of."""
    folder = Path(read_mix(preference)[0].file if is_mix(preference) and "*" in preference else preference).parent
    if not preference or preference in BUNDLED_FILES or not folder.is_dir():
        return []
    fitting = [
        info
        for info in list_preference_models(folder).models
        if info.kind in (*_TASTE_OF_MANY, *_KNOWS_PROMPTS) and info.architecture in ("any", architecture)
    ]
    followed = [describe_preference(model) for model in models_of(preference)]
    return [info for info in fitting if not any(_are_one(info, other) for other in followed)]


def _are_one(one: PreferenceInfo, other: PreferenceInfo) -> bool:
    """Whether two files hold one model: the same file, its twin in half precision, or a copy."""
    names = {info.path.name.removesuffix(TWIN_SUFFIX).removesuffix(info.path.suffix) for info in (one, other)}
    if len(names) == 1:
        return True
    return one.size_bytes == other.size_bytes and fingerprint(str(one.path)) == fingerprint(str(other.path))


def _parts(name: str) -> list[str]:
    """Hashes of the models that a name means; the demo's judges by their names."""
    if name in DEMO.values():
        return [name]
    return [fingerprint(model) for model in models_of(name)]


def _kind(preference: str) -> str:
    try:
        return describe_preference(preference).kind
    except SpoError:  # what `load` will say better
        return ""


def _first(infos: list[PreferenceInfo], kinds: tuple[str, ...]) -> str:
    """The first model of the first of these kinds, by name; NONE without any."""
    fitting = sorted((info for info in infos if info.kind in kinds), key=lambda info: kinds.index(info.kind))
    return str(fitting[0].path) if fitting else NONE
