"""Memory traffic of one forward pass of SDXL's UNet with an adapter: bytes that operators read and write.

    python benchmarks/adapter_traffic.py [--latents 8] [--latent-px 128] [--rank 64]

Counted on shapes alone (torch's meta device), so it needs neither a GPU nor the memory. Sides:

without  the network as it is, float16
ours     with the adapter as `lora.adapter` computes it: small matrices in the network's precision
peft     with the adapter as peft computes it: inputs and products in the adapter's float32

Attention counts as the fused kernel does it; other kernels that are fused, or results that stay in a cache, move less.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class Traffic(TorchDispatchMode):
    """Adds up the bytes of every operator's tensors, but of those that only look at their input."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
            self.bytes += sum(value.numel() * value.element_size() for value in tensors)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--latent-px", type=int, default=128)
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    from diffusers import UNet2DConditionModel

    from spo.lora.adapter import Adapter, modules_of_kinds

    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(**SDXL).half()
        x = torch.zeros(options.latents, 4, options.latent_px, options.latent_px, dtype=torch.float16)
        text = torch.zeros(options.latents, 77, 2048, dtype=torch.float16)
        added = {
            "text_embeds": torch.zeros(options.latents, 1280, dtype=torch.float16),
            "time_ids": torch.zeros(options.latents, 6),
        }

        def moved() -> float:
            with Traffic() as traffic:

                def attention(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
                    """The fused kernel; by itself torch would count the matrix of weights on the meta device."""
                    traffic.bytes += sum(one.numel() * one.element_size() for one in (key, value))
                    return torch.empty_like(query)  # counts its own reading and writing

                functional.scaled_dot_product_attention = attention
                unet(x, torch.zeros(options.latents), text, added_cond_kwargs=added)
            return traffic.bytes / 1e9

        print(f"{'without':8}{moved():8.0f} GB")
        adapter = Adapter(unet, modules_of_kinds(unet, ["attention"]), rank=options.rank, alpha=options.rank)
        print(f"{'ours':8}{moved():8.0f} GB")
        for layer in adapter.layers.values():
            del layer.forward
        print(f"{'peft':8}{moved():8.0f} GB")


if __name__ == "__main__":
    main()
