"""The training settings as form fields: made from the configuration tree, so that nothing is said twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from spo.config import PRESETS, Setting, settings
from spo.errors import SpoError
from spo.presets import preset
from spo.webui.jobs.training import HOST_OWNED

# above "Advanced", by the tab itself
_IN_FRONT = {"preference", "negative_prompt", "steps"}
_NOT_HERE = {*HOST_OWNED, "replace"}
_LABELS = {
    "guidance_scale": "CFG scale",
    "beta": "SPO beta",
    "beta1": "AdamW beta 1",
    "beta2": "AdamW beta 2",
    "epsilon": "AdamW epsilon",
    "candidates": "Candidates per pool",
    "steps": "Updates",
    "modules": "Trained modules",
    "rank": "Network rank (dimension)",
    "alpha": "Network alpha",
    "clip_norm": "Gradient norm limit",
    "sigmas": "Noise levels",
    "schedule": "Learning rate schedule",
    "accumulation": "Gradient accumulation",
    "start_from": "Start from LoRA file",
}
_SECTIONS = {
    "model": "Memory",
    "prompt": "Picture",
    "rollout": "Sampling and pools",
    "preference": "Preference model",
    "loss": "Loss",
    "lora": "LoRA",
    "optimizer": "Optimizer",
    "run": "Saving and samples",
}


def names() -> list[str]:
    """The settings of the form in the order of its fields; those in front come first."""
    listed = [name for name in settings() if name not in _NOT_HERE]
    return sorted(listed, key=lambda name: name not in _IN_FRONT)


def advanced_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """name -> field of every setting that is not in front, in groups, showing `values`. Call inside an accordion."""
    fields: dict[str, Any] = {}
    for section, title in _SECTIONS.items():
        members = [s for s in settings().values() if s.section == section and s.name not in _NOT_HERE | _IN_FRONT]
        if not members:
            continue
        gr.Markdown(f"**{title}**")
        for first in range(0, len(members), 3):
            with gr.Row():
                for setting in members[first : first + 3]:
                    fields[setting.name] = _field(setting, values[setting.name])
    return fields


def label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " ").capitalize())


def _field(setting: Setting, value: Any) -> Any:
    common: dict[str, Any] = {
        "label": label(setting.name),
        "info": setting.help[:1].upper() + setting.help[1:] + ".",
        "elem_id": f"spo_{setting.name}",
    }
    if setting.kind is bool:
        return gr.Checkbox(value=value, **common)
    if setting.choices:
        return gr.Dropdown(list(setting.choices), value=value, **common)
    if setting.kind in (int, float):
        return gr.Number(value=value, precision=0 if setting.kind is int else None, **common)
    return gr.Textbox(value=value, lines=3 if setting.name.endswith("prompts") else 1, **common)


def field_value(setting: Setting, value: Any) -> Any:
    """As a field shows it: lists by commas, prompts by lines."""
    return _separator(setting).join(value) if setting.kind is list else value


def _separator(setting: Setting) -> str:
    return "\n" if setting.name.endswith("prompts") else ", "


def preset_values(preset_name: str, architecture: str) -> list[Any]:
    """What the fields show under a preset on a checkpoint of that architecture, in the order of `names`."""
    return field_values({**PRESETS[architecture], **preset(preset_name).values})


def field_values(values: Mapping[str, Any]) -> list[Any]:
    """What the fields show for `values`, with defaults for the rest."""
    known = settings()
    return [field_value(known[name], values.get(name, known[name].default)) for name in names()]


def edits(fields: Sequence[Any], preset_name: str, architecture: str) -> dict[str, Any]:
    """The settings that the user changed since the fields were filled by `preset_values`, and the preference model.

    Only these are sent with the preset's name, so that a preset means here what it means on the command line and in
    the API, on whatever checkpoint is loaded by then. SpoError for an empty number.
    """
    now, filled = read(fields), read(preset_values(preset_name, architecture))
    return {name: value for name, value in now.items() if value != filled[name] or name == "preference"}


@dataclass(frozen=True)
class Filling:
    """What the fields were last filled with: a preset's name, for a checkpoint of an architecture, in this file."""

    preset: str
    architecture: str
    file_name: str = ""

    def text(self) -> str:
        """As one text, for a field that nobody sees; `of` reads it."""
        return "|".join((self.preset, self.architecture, self.file_name))

    @staticmethod
    def of(text: str) -> Filling:
        """The inverse of `text`."""
        return Filling(*text.split("|", 2))


def refilled(fields: Sequence[Any], before: Filling, after: Filling, stay: Collection[str] | None = None) -> list[Any]:
    """What the fields show when they are filled anew; the user's own changes stay.

    stay  only of these settings; None: of all
    """
    try:
        own = edits(fields, before.preset, before.architecture)
    except SpoError:  # an empty number; it gets its usual value
        own = {}
    own = {name: value for name, value in own.items() if stay is None or name in stay}
    return field_values({**PRESETS[after.architecture], **preset(after.preset).values, **own})


def read(fields: Sequence[Any]) -> dict[str, Any]:
    """Settings from the fields, in the order of `names`. SpoError for an empty number."""
    values: dict[str, Any] = {}
    for name, value in zip(names(), fields, strict=True):
        setting = settings()[name]
        if setting.kind is list:
            parts = str(value or "").split(_separator(setting).strip(" "))
            values[name] = [part.strip() for part in parts if part.strip()]
        elif value is None and setting.kind in (int, float):
            raise SpoError(f"{label(name)} is empty; give a number (usually {setting.default:g}).")
        else:
            values[name] = "" if value is None else value
    return values
