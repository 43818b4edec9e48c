"""The training settings as form fields: made from the configuration tree, so that nothing is said twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from spo.config import PRESETS, Setting, settings
from spo.errors import SpoError
from spo.lora.adapter import MODULE_KINDS
from spo.presets import CARDS, NAMED, preset
from spo.webui import folders
from spo.webui.jobs.training import HOST_OWNED
from spo.webui.seam import webui

# above "Advanced", by the tab itself
_IN_FRONT = {"preference", "steps"}
_LABELS = {
    "guidance_scale": "CFG scale",
    "beta": "SPO beta",
    "dpo_beta": "DPO beta",
    "beta1": "AdamW beta 1",
    "beta2": "AdamW beta 2",
    "epsilon": "AdamW epsilon",
    "candidates": "Candidates per pool",
    "steps": "Length, in updates",
    "modules": "Trained modules",
    "rank": "Network rank (dimension)",
    "alpha": "Network alpha",
    "clip_norm": "Gradient norm limit",
    "sigmas": "Noise levels",
    "schedule": "Learning rate schedule",
    "accumulation": "Gradient accumulation",
    "start_from": "Start from LoRA file",
    "replace": "Replace the LoRA of that name",
    "judge": "Held-out judge",
    "adherence": "Judge of adherence",
    "live_votes": "Train while voting",
    "validate_every": "Judge every, in updates",
    "validate_prompts": "Prompts of the judged pictures",
    "validate_count": "How many of training's, if none",
    "validate_pictures": "Pictures of each prompt",
    "on_decline": "When pictures get worse",
}
_GROUPS = ("Sampling", "Pairs", "LoRA", "Optimizer", "Stages", "Memory", "Saving")
_GROUP_OF_SECTION = {
    "model": "Memory",
    "prompt": "Sampling",
    "rollout": "Sampling",
    "preference": "Memory",
    "loss": "Optimizer",
    "lora": "LoRA",
    "optimizer": "Optimizer",
    "validation": "Stages",
    "run": "Saving",
}
_GROUP_OF = {
    **dict.fromkeys(
        ("candidates", "inner_steps", "divert_start_step", "timestep_min", "timestep_max", "threshold"), "Pairs"
    ),
    **dict.fromkeys(("live_votes", "threshold_noisiest", "rollout_average", "teaching_share"), "Pairs"),
    **dict.fromkeys(("method", "pairs_per_prompt", "prompts_per_batch", "pairs_per_update", "carry_pairs"), "Pairs"),
    **dict.fromkeys(("prompts_per_call", "candidates_per_call", "decode_batch", "pairs_per_call"), "Memory"),
}
_SLIDER_STEPS = {  # where the whole range makes sense to slide over
    "sampling_steps": 1,
    "eta": 0.01,
    "guidance_scale": 0.5,
    "candidates": 1,
    "inner_steps": 1,
    "timestep_min": 1,
    "timestep_max": 1,
    "threshold": 0.01,
    "threshold_noisiest": 0.01,
    "teaching_share": 0.01,
    "winner_preserving": 0.01,
    "ratio_clamp": 0.001,
    "rank": 1,
    "width": 64,
    "height": 64,
}
_NO_LORA = "none"
_LISTS: dict[str, Callable[[], list[str]]] = {
    "modules": lambda: list(MODULE_KINDS),
    "start_from": lambda: [_NO_LORA, *folders.lora_names()],
    "sigmas": lambda: ["ddim", "karras", "exponential", "uniform"],
    "judge": folders.stage_judge_choices,
    "adherence": folders.stage_judge_choices,
}
STRENGTHS = {"Gentle": 0.5, "Usual": 1.0, "Strong": 2.0}  # of the learning rate


def names() -> list[str]:
    """The settings of the form in the order of its fields; those in front come first."""
    listed = [name for name in settings() if name not in HOST_OWNED]
    return sorted(listed, key=lambda name: name not in _IN_FRONT)


def groups() -> dict[str, list[Setting]]:
    """Title -> settings of what is not in front."""
    members: dict[str, list[Setting]] = {title: [] for title in _GROUPS}
    for setting in settings().values():
        if setting.name not in {*HOST_OWNED, *_IN_FRONT}:
            members[_GROUP_OF.get(setting.name, _GROUP_OF_SECTION[setting.section])].append(setting)
    return members


def group_fields(members: Sequence[Setting], values: Mapping[str, Any]) -> dict[str, Any]:
    """name -> field of the settings of one group, showing `values`."""
    fields: dict[str, Any] = {}
    for first in range(0, len(members), 2):
        with gr.Row():
            for setting in members[first : first + 2]:
                fields[setting.name] = _field(setting, values[setting.name])
    return fields


def label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " ").capitalize())


def hint(name: str) -> str:
    """What a setting does, as a sentence under its field."""
    text = settings()[name].help
    return text[:1].upper() + text[1:] + "."


def _field(setting: Setting, value: Any) -> Any:
    common: dict[str, Any] = {
        "label": label(setting.name),
        "info": hint(setting.name),
        "elem_id": f"spo_{setting.name}",
    }
    if setting.name in _LISTS:
        return gr.Dropdown(
            choices_of(setting.name),
            value=value,
            multiselect=setting.kind is list,
            allow_custom_value=setting.name == "sigmas",
            **common,
        )
    if setting.kind is bool:
        return gr.Checkbox(value=value, **common)
    if setting.choices:
        return gr.Dropdown(list(setting.choices), value=value, **common)
    if setting.name in _SLIDER_STEPS:
        return gr.Slider(setting.low, setting.high, value=value, step=_SLIDER_STEPS[setting.name], **common)
    if setting.kind in (int, float):
        return gr.Number(value=value, precision=0 if setting.kind is int else None, **common)
    return gr.Textbox(value=value, lines=3 if setting.name.endswith("prompts") else 1, **common)


def choices_of(name: str) -> list[str]:
    """What a drop-down of a setting offers that the configuration leaves open."""
    return _LISTS[name]()


def field_value(setting: Setting, value: Any) -> Any:
    """As a field shows it: choices as a list, prompts by lines."""
    if setting.name == "start_from":
        return value or _NO_LORA
    if setting.kind is list:
        return list(value) if setting.name in _LISTS else "\n".join(value)
    return value


def preset_values(preset_name: str, architecture: str, memory: str = "") -> list[Any]:
    """What the fields show under a preset and a memory preset on a checkpoint of that architecture, in the order of
    `names`.
    """
    return field_values(_filled_with(Filling(preset_name, architecture, memory=memory)))


def field_values(values: Mapping[str, Any]) -> list[Any]:
    """What the fields show for `values`, with defaults for the rest."""
    known = settings()
    return [field_value(known[name], values.get(name, known[name].default)) for name in names()]


def edits(fields: Sequence[Any], preset_name: str, architecture: str) -> dict[str, Any]:
    """The settings that are other than the preset's, without a memory preset over it, and the preference model.

    Only these are sent with the preset's name, so that a preset means here what it means on the command line and in
    the API, on whatever checkpoint is loaded by then. SpoError for an empty number.
    """
    now, filled = read(fields), read(preset_values(preset_name, architecture))
    return {name: value for name, value in now.items() if value != filled[name] or name == "preference"}


@dataclass(frozen=True)
class Filling:
    """What the fields were last filled with: a preset's name, for a checkpoint of an architecture, in this file.

    memory  the name of a preset for cards whose settings are put over it; "": none
    """

    preset: str
    architecture: str
    file_name: str = ""
    memory: str = ""

    def text(self) -> str:
        """As one text, for a field that nobody sees; `of` reads it."""
        return "|".join((self.preset, self.architecture, self.memory, self.file_name))

    @staticmethod
    def of(text: str) -> Filling:
        """The inverse of `text`."""
        name, architecture, memory, file_name = text.split("|", 3)
        return Filling(name, architecture, file_name, memory)


def _filled_with(filling: Filling) -> dict[str, Any]:
    memory = preset(filling.memory).values if filling.memory else {}
    return {**PRESETS[filling.architecture], **preset(filling.preset).values, **memory}


def refilled(fields: Sequence[Any], before: Filling, after: Filling, stay: Collection[str] | None = None) -> list[Any]:
    """What the fields show when they are filled anew; the user's own changes stay.

    stay  only of these settings; None: of all
    """
    try:
        now, filled = read(fields), read(field_values(_filled_with(before)))
    except SpoError:  # an empty number; it gets its usual value
        now = filled = {}
    own = {name: value for name, value in now.items() if value != filled[name] or name == "preference"}
    own = {name: value for name, value in own.items() if stay is None or name in stay}
    return field_values({**_filled_with(after), **own})


def read(fields: Sequence[Any]) -> dict[str, Any]:
    """Settings from the fields, in the order of `names`. SpoError for an empty number."""
    values: dict[str, Any] = {}
    for name, value in zip(names(), fields, strict=True):
        setting = settings()[name]
        if setting.kind is list:
            parts = value if isinstance(value, list) else str(value or "").splitlines()
            values[name] = [part.strip() for part in parts if part.strip()]
        elif value is None and setting.kind in (int, float):
            raise SpoError(f"{label(name)} is empty; give a number (usually {setting.default:g}).")
        elif name == "start_from" and value == _NO_LORA:
            values[name] = ""
        else:
            values[name] = "" if value is None else value
    return values


# ---------------------------------------------------------------------------------------- preset, memory and strength


def preset_labels(loaded: webui.Glance) -> list[str]:
    """Labels of the presets that suit the loaded checkpoint; those for cards are the choice of memory."""
    return [one.label for one in NAMED.values() if one.name not in CARDS and suits(one.name, loaded)]


def suits(name: str, loaded: webui.Glance) -> bool:
    """Whether a preset is for the loaded checkpoint."""
    if name == "demo":
        return loaded.file_name == folders.DEMO_CHECKPOINT
    return name in NAMED and NAMED[name].architecture in ("", loaded.architecture or "sd15")


def usual_preset(now: str, loaded: webui.Glance) -> str:
    """The preset for the loaded checkpoint: `now`, if it suits that."""
    if loaded.file_name == folders.DEMO_CHECKPOINT:
        return "demo"
    return now if suits(now, loaded) else "paper-sdxl" if loaded.architecture == "sdxl" else "paper-sd15"


MEMORY = {"": "As the preset says", **{name: NAMED[name].label for name in CARDS}}


def usual_memory(card: webui.Card | None) -> str:
    """The memory preset for a card: the largest that leaves it room; "" for a larger card, and for none."""
    if card is None or card.total_gib > 30:
        return ""
    return "24gb" if card.total_gib > 20 else "12gb" if card.total_gib > 10 else "8gb"


def memory_hint(card: webui.Card | None) -> str:
    """What the memory choice was made by."""
    if card is None:
        return "Found: no CUDA card."
    return f"Found: {card.name}, {card.total_gib:.0f} GB."


def strength_of(learning_rate: Any, filling: Filling) -> str | None:
    """The strength that a learning rate is; None for one in between."""
    usual = _filled_with(filling).get("learning_rate", settings()["learning_rate"].default)
    return next((name for name, share in STRENGTHS.items() if learning_rate == usual * share), None)


def learning_rate_of(strength: str, filling: Filling) -> float:
    """The learning rate of a strength under a preset."""
    usual = _filled_with(filling).get("learning_rate", settings()["learning_rate"].default)
    return float(usual * STRENGTHS[strength])
