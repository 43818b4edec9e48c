"""Named groups of settings, for the tab, the API and `--preset`. What the user gives wins over a preset.

The presets for cards change memory only: how much is done at a time. Rank, rates and batches stay the paper's for the
checkpoint's architecture, and so does what comes of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spo.config import PRESETS
from spo.errors import SpoError, nearest


@dataclass(frozen=True)
class Preset:
    """label and text as a user reads them; architecture "" for any."""

    name: str
    label: str
    text: str
    architecture: str
    values: Mapping[str, Any]


_ONE_BY_ONE = {"gradient_checkpointing": True, "pairs_per_call": 1, "prompts_per_call": 1, "decode_batch": 1}
_TIGHT = _ONE_BY_ONE | {"rest_on_cpu": True}

_ALL = (
    Preset("paper-sd15", "Paper, SD1.5", "The settings of the paper for SD1.5.", "sd15", PRESETS["sd15"]),
    Preset("paper-sdxl", "Paper, SDXL", "The settings of the paper for SDXL.", "sdxl", PRESETS["sdxl"]),
    Preset(  # what won in docs/evidence.md and cost no subject, and nothing else
        "improved",
        "Paper, steps in balance",
        "The paper's settings, with the weights of the steps that won on the demo checkpoint.",
        "",
        {"step_weight": "gradspo"},
    ),
    Preset(
        "8gb",
        "8 GB card",
        "One candidate at a time, the network's weights in float8.",
        "",
        _TIGHT | {"candidates_per_call": 1, "weight_storage": "float8"},
    ),
    Preset("12gb", "12 GB card", "One pool at a time.", "", _TIGHT),
    Preset(
        "24gb",
        "24 GB card",
        "Two pools and two pairs at a time.",
        "",
        _ONE_BY_ONE | {"pairs_per_call": 2, "prompts_per_call": 2},
    ),
    Preset(
        "quick",
        "Quick look",
        "A short run with a high learning rate, to see where your taste leads; not for keeping.",
        "",
        {"steps": 60, "sampling_steps": 12, "divert_start_step": 2, "learning_rate": 3e-4, "rank": 8, "save_every": 20},
    ),
    Preset(
        "demo",
        "Demo checkpoint",
        "For the small checkpoint that comes with SPO: a few minutes on two CPU cores.",
        "sd15",
        {
            "width": 64,
            "height": 64,
            "rank": 8,
            "learning_rate": 3e-4,
            "threshold": 0.1,
            "step_weight": "gradspo",  # as in "improved": what the paper's weights reach in 105 updates, in 75
            "prompts_per_batch": 10,
            "pairs_per_update": 20,
            "accumulation": 1,
            "carry_pairs": False,
            "clip_norm": 1.0,
            "steps": 135,
            "save_every": 40,
            "sample_every": 40,
            "validate_every": 10,
            "validate_count": 64,  # of 16 one that is hard to draw decides: docs/stages.md
            "patience": 2,
        },
    ),
)
NAMED = {preset.name: preset for preset in _ALL}
CARDS = ("8gb", "12gb", "24gb")  # those that change memory only


def preset(name: str) -> Preset:
    """The preset of that name; SpoError lists them."""
    if name not in NAMED:
        raise SpoError(f'preset "{name}" is not known{nearest(name, NAMED)}; there are {", ".join(NAMED)}.')
    return NAMED[name]
