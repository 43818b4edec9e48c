"""LoRAs: the active ones, which a Forge merges into weights when it moves them to the card."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from spo.webui.forge.checkpoint import Checkpoint


def lora_extension() -> Any:
    """The module `networks` of the built-in Lora extension, None when it is off."""
    return sys.modules.get("networks")


def active_networks(checkpoint: Checkpoint) -> Callable[[], None]:
    """What makes the LoRAs of now active again; weights follow when the network is next moved to the card."""
    model, extension = checkpoint.model, lora_extension()
    objects = {name: getattr(model, name) for name in ("forge_objects", "forge_objects_after_applying_lora")}
    objects = {name: value.shallow_copy() for name, value in objects.items()}
    merged, listed = model.current_lora_hash, list(getattr(extension, "loaded_networks", ()))

    def put_back() -> None:
        for name, value in objects.items():
            setattr(model, name, value)
        model.current_lora_hash = merged
        if extension is not None:
            extension.loaded_networks[:] = listed

    return put_back
