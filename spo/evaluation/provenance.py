"""What a LoRA's training looked at: so which judge it followed, which one it never saw, and which prompts it knows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.errors import SpoError
from spo.lora.read import read_lora
from spo.preference.load import fingerprint
from spo.preference.mix import models_of
from spo.prompts import read_prompts
from spo.runs.layout import RunFiles, split_stage

FOLLOWED, CHOSE, UNSEEN, UNKNOWN = "trained on", "chose the stage", "never seen by training", "unknown to training"


@dataclass(frozen=True)
class Training:
    """What is known of the training of one LoRA.

    preference  the preference model it followed, as it was named then; "" where the file does not say
    prompts     that it was trained on; empty where they are no longer there
    judges      that its stages were judged by, of which the best one is the LoRA
    """

    preference: str
    prompts: frozenset[str]
    judges: tuple[str, ...] = ()


def training_of(path: Path, run_folder: Path | None = None) -> Training:
    """Of a LoRA file or a stage: from its metadata, or NAME.spo.json beside it, and the prompts its run kept.

    run_folder  where the run keeps its files; default: NAME.spo beside the file

    Raises SpoError as `read_lora` does.
    """
    output = path.with_name(f"{split_stage(path.stem)[0]}{path.suffix}")
    files = RunFiles.of(output, str(run_folder or ""))
    settings = _settings(read_lora(path).metadata.get("spo_config", "")) or _settings(_text(files.settings))
    prompts: list[str] = []
    for place in (files.prompts, Path(str(settings.get("prompts") or "none"))):
        if not prompts and place.is_file():
            with suppress(SpoError):
                prompts = read_prompts(place)
    judges = [str(settings.get(name) or "") for name in ("judge", "adherence")]
    kept = tuple(name for name in judges if name not in ("", "auto", "none"))
    return Training(str(settings.get("preference") or ""), frozenset(prompts), kept)


def role(judge: str, trainings: Iterable[Training]) -> str:
    """FOLLOWED where one of the trainings followed that judge, also in a mix; UNKNOWN where one does not say what it
    followed, as of a LoRA that SPO did not train; CHOSE where it judged a training's stages; else UNSEEN.

    judge  by its name or file, as `load_judge` takes it. Files are the same by their content, and where one is missing
           by their name.
    """
    own = _identities(judge)

    def is_one_of(names: Iterable[str]) -> bool:
        return any(one.is_(other) for name in names for one in own for other in _identities(name))

    known = list(trainings)
    if any(is_one_of([training.preference]) for training in known if training.preference):
        return FOLLOWED
    if not known or not all(training.preference for training in known):
        return UNKNOWN
    return CHOSE if any(is_one_of(training.judges) for training in known) else UNSEEN


@dataclass(frozen=True)
class _Identity:
    """content: the hash of a model's weights, "" where its file is gone; name: its file's."""

    content: str
    name: str

    def is_(self, other: _Identity) -> bool:
        """By content where both are there."""
        return self.content == other.content if self.content and other.content else self.name == other.name


def _identities(name: str) -> list[_Identity]:
    """Of a model, or of all models of a mix."""
    known = []
    for part in models_of(name):
        content = ""
        with suppress(SpoError):
            content = fingerprint(part)
        known.append(_Identity(content, Path(part).stem))
    return known


def _settings(text: str) -> Mapping[str, Any]:
    with suppress(ValueError):
        settings = json.loads(text)
        if isinstance(settings, dict):
            return settings
    return {}


def _text(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return ""
