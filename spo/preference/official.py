"""The step-aware preference models that the paper's authors published: names, hashes, where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OfficialFile:
    """A published model, as its authors uploaded it on 2024-06-21. sha256: of the whole file."""

    name: str
    sha256: str


OFFICIAL_REPOSITORY = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
OFFICIAL_FILES = {  # by architecture; the hashes are those that the repository's pages state
    "sd15": OfficialFile(
        "sd-v1-5_step-aware_preference_model.bin",
        "02b7c39cf116b97774b52aa6b4590e0d17cf6d21758ae5e541530458dedf7470",
    ),
    "sdxl": OfficialFile(
        "sdxl_step-aware_preference_model.bin",
        "80917b1f044a05a3b63af74eabbb0bc758af535d488a7ee09f1dbbf2971407ca",
    ),
}


def where_official(architecture: str) -> str:
    """Where the published model for an architecture is found."""
    official = [OFFICIAL_FILES[architecture]] if architecture in OFFICIAL_FILES else OFFICIAL_FILES.values()
    return f"the official one is {' or '.join(file.name for file in official)} of huggingface.co/{OFFICIAL_REPOSITORY}"


def official_architecture(path: Path) -> str | None:
    """Whose published model a file is by its name; None for any other file."""
    return next((known for known, file in OFFICIAL_FILES.items() if file.name == path.name), None)
