"""Earlier runs in the LoRA folder: what they are, and how to delete them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.config import read_config_file
from spo.errors import SpoError
from spo.runs.layout import RunFiles, split_stage
from spo.runs.metrics import read_metrics
from spo.webui import folders
from spo.webui.seam import webui


@dataclass(frozen=True)
class Run:
    """One run. rows: of metrics; checks: rows of validation.csv; samples: pictures, oldest first.

    lora  the finished file, None before the end
    """

    name: str
    config: Mapping[str, Any]
    rows: list[dict[str, float]]
    checks: list[dict[str, float]]
    samples: list[Path]
    lora: Path | None
    stages: list[Path]

    @property
    def step(self) -> int:
        """Updates made: a stop in the middle of a batch leaves a stage, but no row yet."""
        of_rows = int(self.rows[-1].get("step", 0)) if self.rows else 0
        of_stages = split_stage(self.stages[-1].stem)[1] if self.stages else None
        return max(of_rows, of_stages or 0)

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
            "best stage": next((f"update {check['step']:g}" for check in self.checks if check.get("best")), ""),
            "LoRA": self.lora.name if self.lora else "not finished",
            "stages": ", ".join(path.stem for path in self.stages) or "none",
        }
        return "\n".join(f"{name:14}{value}" for name, value in facts.items() if value not in ("", None))


def read(name: str) -> Run:
    """The run of that name. Raises SpoError when there is none."""
    files = folders.run_files(name)
    if not files.config.exists():
        raise SpoError(f'There is no run called "{name}".')
    return Run(
        name,
        read_config_file(files.config),
        metrics(files),
        checks(files),
        files.all_samples(),
        files.output if files.output.exists() else None,
        files.stages(),
    )


def metrics(files: RunFiles) -> list[dict[str, float]]:
    """The rows of a run's metrics; empty before the first."""
    return read_metrics(files.metrics) if files.metrics.exists() else []


def checks(files: RunFiles) -> list[dict[str, float]]:
    """The rows of a run's validation.csv; empty where its stages are not judged."""
    return read_metrics(files.validation) if files.validation.exists() else []


def delete(name: str, lora_too: bool) -> int:
    """Delete a run's own files, and its LoRA, stages and cards when asked; how many. What others put there stays."""
    run, files = read(name), folders.run_files(name)
    doomed: list[Path] = []
    if lora_too:
        for lora in [files.output, *run.stages]:
            doomed += [lora, *(lora.with_suffix(ending) for ending in (".json", ".png"))]
        doomed = [path for path in [*doomed, files.settings] if path.is_file()]
    for path in doomed:
        path.unlink()
    count = len(doomed) + files.delete()
    webui.refresh_loras()
    return count
