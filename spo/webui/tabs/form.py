"""The training settings as form fields: made from the configuration tree, so that nothing is said twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from spo.config import Setting, settings
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


def advanced_fields() -> dict[str, Any]:
    """name -> field of every setting that is not in front, in groups. Call inside an accordion."""
    fields: dict[str, Any] = {}
    for section, title in _SECTIONS.items():
        members = [s for s in settings().values() if s.section == section and s.name not in _NOT_HERE | _IN_FRONT]
        if not members:
            continue
        gr.Markdown(f"**{title}**")
        for first in range(0, len(members), 3):
            with gr.Row():
                for setting in members[first : first + 3]:
                    fields[setting.name] = _field(setting)
    return fields


def label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " ").capitalize())


def _field(setting: Setting) -> Any:
    common: dict[str, Any] = {
        "label": label(setting.name),
        "info": setting.help[:1].upper() + setting.help[1:] + ".",
        "elem_id": f"spo_{setting.name}",
    }
    value = field_value(setting, setting.default)
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


def preset_values(name: str) -> list[Any]:
    """What the fields show under a preset, in the order of `names`; what is no matter of presets stays as it is."""
    untouched = {"negative_prompt", "sample_prompts", *(() if name == "demo" else ("preference",))}
    values = {"preference": "demo", **preset(name).values}
    return [gr.update() if n in untouched else v for n, v in zip(names(), field_values(values), strict=True)]


def field_values(values: Mapping[str, Any]) -> list[Any]:
    """What the fields show for `values`, with defaults for the rest."""
    known = settings()
    return [field_value(known[name], values.get(name, known[name].default)) for name in names()]


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
