"""What is in a LoRA file, in words."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from spo.lora.describe import describe
from spo.lora.metadata import lora_metadata
from spo.lora.read import read_lora
from spo.lora.write import write_lora
from tests.loras import FACTS, SD15_QUERY, layer


def test_description(tmp_path: Path) -> None:
    layers = {
        SD15_QUERY: layer(),
        SD15_QUERY.replace("attn1", "attn2"): layer(rank=3, alpha=2.0),
        "lora_unet_down_blocks_0_downsamplers_0_conv": layer(1, (8, 8, 3, 3)),
        "lora_unet_mid_block_resnets_0_time_emb_proj": layer(2),
        "lora_unet_time_embedding_linear_1": dataclasses.replace(layer(), up=torch.zeros(6, 2)),
    }
    write_lora(tmp_path / "x.safetensors", layers, lora_metadata("x", FACTS), dtype=torch.float32)
    found = describe(read_lora(tmp_path / "x.safetensors"))
    kinds = ("self-attention", "cross-attention", "resampling", "residual block", "other")
    assert found.kinds == dict.fromkeys(kinds, 1)
    assert (dict(found.ranks), dict(found.alphas)) == ({2: 4, 3: 1}, {1.0: 4, 2.0: 1})
    assert found.zero_layers == 1
    assert found.norm == pytest.approx(math.sqrt(sum(lora.norm() ** 2 for lora in layers.values())), rel=1e-6)
    text = found.text()
    for part in ("x.safetensors", "float32", "LoRA for Stable Diffusion 1.5", "2 (4 layers), 3 (1 layers)", "6e-05",
                 "model.safetensors", "0123456789", "1 layers change nothing", "2023-11-14"):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= 100
