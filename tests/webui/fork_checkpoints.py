"""Checkpoints of random weights that WebUIs of the Forge kind take, written where there are none yet.

Forks build networks by tables of theirs and refuse what is not in them, so the widths here are the real ones (320
channels, text of 768 and 2048, CLIP and VAE of full size) and only the UNet has few blocks. SD1.5 is taken as it is, by
a started WebUI too. SDXL is told by the depth of each block and has a text encoder of 32 layers: `few_blocks` makes a
WebUI of this process take one with fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests import tiny_checkpoints

DEPTHS = (0, 1, 1)  # of the small SDXL's levels, of two residual blocks each as the real one's
WIDE_LAYERS = 3  # the forks take the last but one of them, and ask for more than two
FULL = {"vae_channels": (128, 256, 512, 512), "vae_blocks": 2, "text_inner": 4, "res_blocks": 2, "deviation": 0.04}


def write_missing(folder: Path) -> None:
    """spo-test-sd15 and spo-test-sdxl in the WebUI's folder of checkpoints (0.6 and 0.8 GB)."""
    sd15, sdxl = folder / "spo-test-sd15.safetensors", folder / "spo-test-sdxl.safetensors"
    if not sd15.exists():
        tiny_checkpoints.write_tiny_sd15(
            sd15, channels=(320,) * 4, text_width=768, text_layers=12, text_heads=12, **FULL
        )
        tiny_checkpoints.tiny_sd15.cache_clear()
    if not sdxl.exists():
        tiny_checkpoints.write_tiny_sdxl(
            sdxl, channels=(320, 320, 320), depths=DEPTHS, text_widths=(768, 1280), text_layers=(12, WIDE_LAYERS),
            text_heads=(12, 20), projection=1280, **FULL,
        )  # fmt: skip
        tiny_checkpoints.tiny_sdxl.cache_clear()


def few_blocks() -> None:
    """Make the WebUI of this process take `spo-test-sdxl` for SDXL, and make its wide text encoder as small."""
    from transformers import CLIPTextConfig

    if find_spec("ldm_patched") is not None:
        from ldm_patched.modules.supported_models import SDXL
    else:
        from huggingface_guess.model_list import SDXL

    SDXL.unet_config["transformer_depth"] = [depth for depth in DEPTHS for _ in range(2)]

    def with_few_layers(read: Callable[..., CLIPTextConfig]) -> Callable[..., CLIPTextConfig]:
        def read_it(*args: Any, **kwargs: Any) -> CLIPTextConfig:
            config = read(*args, **kwargs)
            if config.num_hidden_layers > 12:
                config.num_hidden_layers = WIDE_LAYERS
            return config

        return read_it

    for name in ("from_json_file", "from_pretrained"):
        setattr(CLIPTextConfig, name, with_few_layers(getattr(CLIPTextConfig, name)))


if __name__ == "__main__":
    import sys

    write_missing(Path(sys.argv[1]))
