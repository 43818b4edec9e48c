"""The adapter of a run as a LoRA file: a stage on the way, or the output."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from spo.config import Config
from spo.errors import SpoError
from spo.lora.adapter import Adapter
from spo.lora.layer import with_one_alpha
from spo.lora.metadata import LoraFacts, lora_metadata
from spo.lora.module_names import file_name
from spo.lora.read import read_lora
from spo.lora.write import write_lora
from spo.runs.layout import RunFiles
from spo.training.host import Host


def write_stage(path: Path, adapter: Adapter, host: Host, config: Config, step: int, facts: Mapping[str, Any]) -> None:
    """The adapter as it is now as a LoRA file, that of update `step`; one of this run's own is replaced."""
    network = [name for name, _ in host.network.named_modules()]
    named = {
        file_name(name, host.naming, host.architecture, network): layer for name, layer in adapter.weights().items()
    }
    lora_facts = LoraFacts(
        architecture=host.architecture,
        prediction_type=host.prediction_type,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        checkpoint_name=host.checkpoint_name,
        checkpoint_hash=host.checkpoint_hash,
        started_at=facts["started_at"],
        learning_rate=config.optimizer.learning_rate,
        steps=step,
        epochs=config.optimizer.epochs,
        seed=config.run.seed,
        batch_size=config.optimizer.prompts_per_batch,
        precision=str(host.dtype).removeprefix("torch."),
        width_px=config.prompt.width,
        height_px=config.prompt.height,
        run_id=facts["run_id"],
        spo_config=config.flat(),
    )
    write_lora(
        path,
        with_one_alpha(named),  # some loaders apply one alpha to all layers
        lora_metadata(path.stem, lora_facts),
        dtype=getattr(torch, config.run.save_precision),
        replace=config.run.replace or (path.exists() and _run_id_of(path) == facts["run_id"]),
    )


def stages_of_spo(files: RunFiles) -> list[Path]:
    """The output's stages that SPO wrote."""
    return [path for path in files.stages() if _run_id_of(path)]


def _run_id_of(path: Path) -> str:
    with suppress(SpoError):
        return read_lora(path).metadata.get("spo_run_id", "")
    return ""
