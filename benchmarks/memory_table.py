"""What a run needs of a card, phase by phase: the table of docs/memory.md, counted without a card.

    python benchmarks/memory_table.py [--check]

For each preset for cards, with SD1.5 at 512 px and SDXL at 1024 px, `headless.memory_plan` goes through a run on the
imaginary card: files of full size full of holes, the step-aware CLIP of the published size (ViT-H/14), the paper's
settings for the architecture but for what the preset changes. Half a minute a row on one core.

--check  counts anew and compares with the table, to 0.1 GiB; exit code 1 where it differs
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spo.config import build_config
from spo.files import write_text
from spo.headless.memory_plan import PHASES, MemoryPlan, count_memory
from spo.preference.clip.step_aware import StepAwareCLIP
from spo.preference.clip.towers import ClipShape, TowerShape
from spo.presets import preset
from spo.report.tables import table
from tests.crafted_files import craft, full_size_shapes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
BEGIN, END = "<!-- counted by benchmarks/memory_table.py -->", "<!-- to here -->"
VIT_H = ClipShape(TowerShape(1024, 4096, 24, 16), TowerShape(1280, 5120, 32, 16), 49408, 14, 224, 1024)
COLUMNS = [phase for phase in PHASES if phase != "check"]  # without judges
CARDS = {"8gb": 8, "12gb": 12, "24gb": 24}  # GiB
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("sd15", "8gb", {}),
    ("sd15", "12gb", {}),
    ("sd15", "24gb", {}),
    ("sdxl", "8gb", {}),
    ("sdxl", "8gb", {"weight_storage": "precision"}),
    ("sdxl", "12gb", {}),
    ("sdxl", "12gb", {"weight_storage": "float8"}),
    ("sdxl", "24gb", {}),
    ("sdxl", "24gb", {"weight_storage": "float8"}),
)
PROMPTS = [f"a picture of {number} foxes in the snow" for number in range(40)]


def write_files(folder: Path, architectures: Sequence[str] = ("sd15", "sdxl")) -> None:
    """A checkpoint of each architecture and scorer.safetensors: names and shapes, and holes."""
    for architecture in architectures:
        craft(folder / f"{architecture}.safetensors", full_size_shapes(architecture))
    with torch.device("meta"):
        scorer = StepAwareCLIP(VIT_H, "scorer")
    shapes = {f"model.{name}": tuple(tensor.shape) for name, tensor in scorer.state_dict().items()}
    craft(folder / "scorer.safetensors", shapes)


def counted(folder: Path, architecture: str, name: str, changes: dict[str, Any]) -> MemoryPlan:
    """The memory of one row, by the files that `write_files` made."""
    files = {
        "checkpoint": str(folder / f"{architecture}.safetensors"),
        "preference": str(folder / "scorer.safetensors"),
    }
    values = {**preset(name).values, **changes, **files, "output": str(folder / "a.safetensors")}
    return count_memory(build_config(values, architecture), PROMPTS, on_card=True)


def storage(name: str, changes: dict[str, Any]) -> str:
    """Of the network's weights: "float16" or "float8"."""
    stored = {**preset(name).values, **changes}.get("weight_storage", "precision")
    return "float16" if stored == "precision" else str(stored)


def row_of(architecture: str, name: str, changes: dict[str, Any], plan: MemoryPlan) -> list[object]:
    """As it stands in the table."""
    phases = [f"{plan.phases_gib[phase]:.1f}" for phase in COLUMNS]
    return [architecture, name, storage(name, changes), *phases, f"{plan.peak_gib:.1f}", CARDS[name]]


def rows_of(page: str) -> list[list[str]]:
    """The table's rows on the page, cell by cell."""
    lines = page.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    page = PAGE.read_text(encoding="utf-8")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        for architecture, name, changes in ROWS:
            rows.append(row_of(architecture, name, changes, counted(Path(folder), architecture, name, changes)))
            print(*rows[-1], flush=True)
    if options.check:
        pairs = zip(rows_of(page), rows, strict=True)
        wrong = [new for old, new in pairs if old[:3] != new[:3] or not _agree(old[3:], new[3:])]
        print(f"{len(wrong)} of {len(rows)} rows differ from {PAGE.name}")
        return 1 if wrong else 0
    headers = ["checkpoint", "preset", "weights", *COLUMNS, "peak", "card"]
    before, _, rest = page.partition(BEGIN)
    counted_table = table(rows, headers, markdown=True)
    write_text(PAGE, f"{before}{BEGIN}\n{counted_table}\n{END}{rest.partition(END)[2]}")
    return 0


def _agree(old: list[str], new: list[object]) -> bool:
    return all(abs(float(a) - float(str(b))) < 0.11 for a, b in zip(old, new, strict=True))


if __name__ == "__main__":
    sys.exit(main())
