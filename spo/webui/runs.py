"""Earlier runs in the LoRA folder: what they are, and how to delete them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.config import read_config_file
from spo.errors import SpoError
from spo.training.loop import stages
from spo.webui import a1111, folders

# what training writes into a run folder; nothing else is ever deleted
_OWN_FILES = ("state.spo", "metrics.csv", "config.json", "prompts.json", "curves.png")


@dataclass(frozen=True)
class Run:
    """One run. rows: of metrics; samples: pictures, oldest first; lora: the finished file, None before the end."""

    name: str
    config: Mapping[str, Any]
    rows: list[dict[str, float]]
    samples: list[Path]
    lora: Path | None
    stages: list[Path]

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    def text(self) -> str:
        """A few lines for people."""
        last = self.rows[-1] if self.rows else {}
        facts = {
            "checkpoint": Path(str(self.config.get("checkpoint", ""))).name,
            "preference": Path(str(self.config.get("preference", ""))).name,
            "updates": f"{self.step}" + (f" of {self.config['steps']}" if self.config.get("steps") else ""),
            "rank": self.config.get("rank"),
            "learning rate": self.config.get("learning_rate"),
            "score": f"{last['preference_mean']:.3g}" if "preference_mean" in last else "",
            "LoRA": self.lora.name if self.lora else "not finished",
            "stages": ", ".join(path.stem for path in self.stages) or "none",
        }
        return "\n".join(f"{name:14}{value}" for name, value in facts.items() if value not in ("", None))


def read(name: str) -> Run:
    """The run of that name. Raises SpoError when there is none."""
    output = folders.lora_path(name)
    folder = folders.run_folder(name)
    if not (folder / "config.json").exists():
        raise SpoError(f'there is no run called "{name}".')
    return Run(
        name,
        read_config_file(folder / "config.json"),
        metrics(folder),
        sorted((folder / "samples").glob("step*.png")),
        output if output.exists() else None,
        stages(output),
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run folder's metrics.csv; empty without one."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def delete(name: str, lora_too: bool) -> int:
    """Delete a run's own files, and its LoRA, stages and cards when asked; how many. What others put there stays."""
    run = read(name)
    output = folders.lora_path(name)
    folder = folders.run_folder(name)
    doomed = [folder / own for own in _OWN_FILES] + run.samples + sorted((folder / "tensorboard").glob("events.*"))
    if lora_too:
        for lora in [output, *run.stages]:
            doomed += [lora, *(lora.with_suffix(ending) for ending in (".spo.json", ".json", ".png"))]
    doomed = [path for path in doomed if path.is_file()]
    for path in doomed:
        path.unlink()
    for place in (folder / "samples", folder / "tensorboard", folder):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    a1111.refresh_loras()
    return len(doomed)
