"""LoRA layers and files for tests, also in other programs' spellings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from spo.lora.layer import LoraLayer
from spo.lora.metadata import LoraFacts
from spo.lora.module_names import file_name
from tests.tiny_networks import weighted

SD15_QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
SDXL_QUERY = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
FACTS = LoraFacts(
    architecture="sd15",
    prediction_type="epsilon",
    rank=2,
    alpha=1.0,
    checkpoint_name="model.safetensors",
    checkpoint_hash="0123456789",
    started_at=1_700_000_000.25,
    learning_rate=6e-5,
    steps=30,
    epochs=2,
    seed=7,
    batch_size=10,
    precision="float16",
    run_id="run",
    spo_config={"beta": 10.0, "modules": ["attention"], "prompts": "Füße.txt"},
    finished_at=1_700_000_100.0,
)


def layer(seed: int = 0, shape: tuple[int, ...] = (6, 4), rank: int = 2, alpha: float = 1.0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return LoraLayer(down, torch.randn(shape[0], rank, *[1] * len(shape[2:]), generator=generator), alpha)


def two_layers() -> dict[str, LoraLayer]:
    convolution = layer(1, (8, 4, 3, 3), rank=3, alpha=0.1)
    return {SD15_QUERY: layer(), "lora_unet_down_blocks_0_resnets_0_conv1": convolution}


def folder_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(dict(tensors), str(path), metadata)
    return path


def kohya(name: str, lora: LoraLayer, alpha: bool = True) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_down.weight": lora.down, f"{name}.lora_up.weight": lora.up}
    return {**tensors, f"{name}.alpha": torch.tensor(lora.alpha)} if alpha else tensors


QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def loras_for(unet: nn.Module, architecture: str, names: list[str]) -> dict[str, LoraLayer]:
    """Random layers by file name; ranks and alphas differ from layer to layer."""
    modules = weighted(unet)
    made = {}
    for index, name in enumerate(names):
        lora = layer(index, tuple(modules[name].weight.shape), rank=1 + index % 3, alpha=0.5 + index % 2)  # type: ignore[arg-type]
        made[file_name(name, "diffusers", architecture, list(modules))] = lora
    return made
