"""Flags for settings, one for each, and the values that the user gave."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from spo.config import read_config_file, settings
from spo.errors import SpoError
from spo.presets import NAMED
from spo.runs.layout import RunFiles


def add_settings(parser: argparse.ArgumentParser, *wanted: str) -> None:
    """A flag for every setting, or for those of the wanted sections or "section.name"; not given: not in the result."""
    groups: dict[str, Any] = {}
    for setting in settings().values():
        if wanted and setting.section not in wanted and f"{setting.section}.{setting.name}" not in wanted:
            continue
        group = groups.setdefault(setting.section, parser.add_argument_group(setting.section))
        flags = list(dict.fromkeys([f"--{setting.name.replace('_', '-')}", f"--{setting.name}"]))
        text = setting.help.replace("%", "%%")
        default = "" if setting.default in ("", (), 0) else f" (default: {_default_text(setting.default)})"
        extra: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": setting.name, "help": text + default}
        if setting.kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif setting.kind is list:
            extra |= {"nargs": "*", "metavar": "TEXT"}
        else:
            extra["metavar"] = "|".join(setting.choices) or setting.kind.__name__.upper()
        group.add_argument(*flags, **extra)


def _default_text(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def given_values(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user gave, each winning over those before it.

    The preset's, the resumed run's, the config file's, the flags'. Raises SpoError for a file that cannot be read.
    """
    values: dict[str, Any] = {}
    if getattr(options, "preset", None):
        values |= NAMED[options.preset].values
    if getattr(options, "resume", False) and hasattr(options, "output"):
        saved = RunFiles.of(options.output, getattr(options, "run_folder", "")).config
        values |= read_config_file(saved) if saved.exists() else {}
    if getattr(options, "config", None):
        values |= read_config_file(options.config)
    return values | {name: value for name, value in vars(options).items() if name in settings()}


def require(values: Mapping[str, Any], *names: str) -> None:
    """Raise SpoError for the first of the settings that has no value."""
    for name in names:
        if not values.get(name):
            raise SpoError(f"--{name} is missing; give it as a flag or in the --config file.")
