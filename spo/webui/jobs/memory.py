"""The memory of each phase of a run that the tab plans, counted by `spo train --dry-run` in a process of its own.

Counting is some seconds of nothing but Python: in the WebUI's own process it would hold up whoever makes pictures, and
meet the WebUI's changes to PyTorch. The other process sees the checkpoint's file alone, so neither the loaded model nor
the card is touched. What it counts are diffusers' networks of the file's shapes in half precision; the WebUI's own are
of the same shapes, and are not counted. What the WebUI leaves on the card, where SPO alone would not, is added.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from spo.config import Config
from spo.headless.memory_plan import MemoryPlan

TIMEOUT_S = 180
NO_CARD_GIB = 1024.0  # asks for a count in half precision where there is no card to compare with
_ROOT = Path(__file__).parents[3]
_BY_DIFFUSERS = "(counted for diffusers' network of these shapes, not measured on a card)"


def memory_text(
    config: Config, prompts: Sequence[str], card_gib: float | None, *, text_gib: float, vae_gib: float
) -> str:
    """The peak of each phase against the card's memory, in two lines; or one that says why it was not counted.

    card_gib  None where there is no CUDA card
    text_gib, vae_gib  what the WebUI's text encoders and its VAE leave on the card all the time
    """
    try:
        plan = _counted(json.dumps(config.flat() | {"run_folder": ""}), tuple(prompts), card_gib or NO_CARD_GIB)
    except subprocess.TimeoutExpired:
        return f"memory      not counted: it took more than {TIMEOUT_S} seconds"
    except RuntimeError as error:
        return f"memory      not counted: {error}"
    stays = {name: text_gib for name in ("rollout", "decode", "score", "train", "check")}
    if config.model.rest_on_cpu:  # there the VAE is counted while it decodes, and nowhere else
        stays |= {name: text_gib + vae_gib for name in ("rollout", "score", "train", "check")}
    phases = {name: gib + stays.get(name, 0.0) for name, gib in plan.phases_gib.items()}
    return f"{MemoryPlan(phases, plan.precision).text(card_gib)}\n            {_BY_DIFFUSERS}"


@lru_cache(maxsize=16)
def _counted(values: str, prompts: tuple[str, ...], card_gib: float) -> MemoryPlan:
    """Raises RuntimeError with the other process's last words, and subprocess.TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        settings, texts = Path(folder) / "settings.json", Path(folder) / "prompts.json"
        settings.write_text(values, encoding="utf-8")
        texts.write_text(json.dumps(prompts), encoding="utf-8")
        flags = ["--config", str(settings), "--prompts", str(texts), "--output", str(Path(folder) / "a.safetensors")]
        done = subprocess.run(
            [sys.executable, "-m", "spo", "train", *flags, "--dry-run", "--json", "--card-gib", f"{card_gib:g}"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=TIMEOUT_S,
        )
    if done.returncode not in (0, 3):
        raise RuntimeError((done.stderr.strip() or "the counting process ended").splitlines()[-1])
    plan = json.loads(done.stdout)
    return MemoryPlan(plan["phases_gib"], plan["precision"])
