"""Settings that the user saved by name, and those of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo.config import read_config_file, settings
from spo.errors import SpoError
from spo.files import exists_already, write_text
from spo.webui import folders
from spo.webui.jobs.training import HOST_OWNED

_RUN = "run: "


def _folder() -> Path:
    return folders.preference_folder() / "settings"


def names() -> list[str]:
    """Saved ones, then "run: NAME" of every run."""
    saved = sorted(path.stem for path in _folder().glob("*.json"))
    return [*saved, *(f"{_RUN}{name}" for name in folders.run_names())]


def save(name: str, values: Mapping[str, Any]) -> Path:
    """Write models/SPO/settings/NAME.json. Raises SpoError for a bad name, or one that is taken."""
    text = folders.plain_name(name, "the name of the settings")
    path = _folder() / f"{text}.json"
    if path.exists():
        raise exists_already(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dict(values), indent=2) + "\n")
    return path


def load(name: str) -> dict[str, Any]:
    """The settings of a name of `names()`, without those that the WebUI owns. Raises SpoError."""
    if name not in names():
        raise SpoError(f'there are no settings called "{name}".')
    of_run = name.startswith(_RUN)
    path = folders.run_files(name.removeprefix(_RUN)).config if of_run else _folder() / f"{name}.json"
    values = read_config_file(path)
    preference = str(values.get("preference", ""))
    if preference and Path(preference).is_relative_to(folders.preference_folder()):
        values["preference"] = Path(preference).relative_to(folders.preference_folder()).as_posix()
    if values.get("start_from"):
        values["start_from"] = folders.lora_name(Path(str(values["start_from"])))
    return {key: value for key, value in values.items() if key in settings() and key not in {*HOST_OWNED, "replace"}}
