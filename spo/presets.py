"""Named groups of settings, for the tab, the API and `--preset`. What the user gives wins over a preset.

The presets for small cards change how much is done at a time and the LoRA's size; pool, guidance and loss stay the
paper's. Their memory is an estimate (spo.headless.plan), not measured on such cards.
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


_SMALL = {"gradient_checkpointing": True, "pairs_per_call": 1, "candidates_per_call": 1, "decode_batch": 1}

_ALL = (
    Preset("paper-sd15", "Paper, SD1.5", "The settings of the paper for SD1.5.", "sd15", PRESETS["sd15"]),
    Preset("paper-sdxl", "Paper, SDXL", "The settings of the paper for SDXL.", "sdxl", PRESETS["sdxl"]),
    Preset("8gb", "8 GB card", "One picture at a time, with gradient checkpointing.", "", _SMALL | {"rank": 4}),
    Preset(
        "12gb",
        "12 GB card",
        "Two at a time, with gradient checkpointing.",
        "",
        _SMALL | {"pairs_per_call": 2, "candidates_per_call": 2, "decode_batch": 2, "rank": 8},
    ),
    Preset("24gb", "24 GB card", "Pools in one call, five pairs at a time.", "", {"pairs_per_call": 5, "rank": 16}),
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
            "prompts_per_batch": 10,
            "pairs_per_update": 20,
            "steps": 110,
            "save_every": 40,
            "sample_every": 40,
        },
    ),
)
NAMED = {preset.name: preset for preset in _ALL}


def preset(name: str) -> Preset:
    """The preset of that name; SpoError lists them."""
    if name not in NAMED:
        raise SpoError(f'preset "{name}" is not known{nearest(name, NAMED)}; there are {", ".join(NAMED)}.')
    return NAMED[name]
