"""What the metadata of a LoRA file tells about its training, in the words of kohya, Stability (modelspec) and SPO."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TypeVar

from spo import __version__
from spo.errors import SpoError

_T = TypeVar("_T")


@dataclass(frozen=True)
class LoraFacts:
    """What the metadata of a file tells about its training.

    architecture       "sd15" or "sdxl"; prediction_type: "epsilon" or "v_prediction"
    checkpoint_hash    sha256 of the checkpoint or its first 10 digits; "": unknown
    started_at, finished_at  seconds since 1970; finished_at None: now
    precision          of the frozen network: "float32", "float16" or "bfloat16"
    width_px, height_px  of the training pictures; 0: the architecture's own
    spo_config         every setting of the run, by name; what JSON can hold
    tag_frequency      kohya's {folder: {tag: count}}, shown on the WebUI's card
    """

    architecture: str
    prediction_type: str
    rank: int
    alpha: float
    checkpoint_name: str
    checkpoint_hash: str
    started_at: float
    learning_rate: float
    steps: int
    epochs: int
    seed: int
    batch_size: int
    precision: str
    width_px: int = 0
    height_px: int = 0
    run_id: str = ""
    spo_config: Mapping[str, object] = field(default_factory=dict)
    finished_at: float | None = None
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def lora_metadata(name: str, facts: LoraFacts) -> dict[str, str]:
    """kohya's, Stability's (modelspec) and SPO's own metadata, strings all. `write_lora` adds the hashes.

    name  of the file without `.safetensors`, by which the WebUI's prompts call it

    Raises SpoError for an unknown architecture, prediction type or precision.
    """
    sdxl = _one_of("architecture", facts.architecture, {"sd15": False, "sdxl": True})
    prediction = _one_of("prediction_type", facts.prediction_type, {"epsilon": "epsilon", "v_prediction": "v"})
    mixed = _one_of("precision", facts.precision, {"float32": "no", "float16": "fp16", "bfloat16": "bf16"})
    finished = time.time() if facts.finished_at is None else facts.finished_at
    width, height = (px or (1024 if sdxl else 512) for px in (facts.width_px, facts.height_px))
    metadata = {
        "ss_output_name": name,
        "ss_base_model_version": "sdxl_base_v1-0" if sdxl else "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": facts.checkpoint_name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(facts.rank),
        "ss_network_alpha": str(facts.alpha),
        "ss_training_started_at": str(facts.started_at),
        "ss_training_finished_at": str(finished),
        "ss_learning_rate": str(facts.learning_rate),
        "ss_unet_lr": str(facts.learning_rate),
        "ss_steps": str(facts.steps),
        "ss_num_epochs": str(facts.epochs),
        "ss_seed": str(facts.seed),
        "ss_total_batch_size": str(facts.batch_size),
        "ss_mixed_precision": mixed,
        "ss_resolution": f"({width}, {height})",
        "ss_tag_frequency": json.dumps(facts.tag_frequency, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if sdxl else 'v1'}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if sdxl else "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": prediction,
        "modelspec.date": datetime.fromtimestamp(finished, timezone.utc).isoformat(timespec="seconds"),
        "spo_version": __version__,
        "spo_config": json.dumps(facts.spo_config, ensure_ascii=False),
    }
    if facts.checkpoint_hash:
        metadata["ss_sd_model_hash"] = facts.checkpoint_hash[:10]
    if len(facts.checkpoint_hash) == 64:
        metadata["ss_new_sd_model_hash"] = facts.checkpoint_hash
    if facts.run_id:
        metadata["spo_run_id"] = facts.run_id
    return metadata


def _one_of(name: str, value: str, choices: Mapping[str, _T]) -> _T:
    if value not in choices:
        raise SpoError(f'{name} "{value}" is not known; choose from {", ".join(choices)}.')
    return choices[value]
