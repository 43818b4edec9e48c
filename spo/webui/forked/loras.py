"""LoRAs as Forges keep them: patches of the loaded model, which are merged when it is moved to the card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spo.webui import a1111
from spo.webui.a1111.loras import lora_extension

_OBJECTS = ("forge_objects", "forge_objects_after_applying_lora")


def activate_networks(prompt: str, model: Any) -> None:
    """Make the networks that a prompt names the model's active ones, and no others; weights follow when used."""
    a1111.activate_networks(prompt)
    model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()


def active_networks(model: Any) -> Callable[[], None]:
    """What makes the LoRAs of now the model's again; weights follow when they are used."""
    extension = lora_extension()
    listed = list(getattr(extension, "loaded_networks", ()))
    merged, objects = model.current_lora_hash, {name: getattr(model, name).shallow_copy() for name in _OBJECTS}

    def put_back() -> None:
        if extension is not None:
            extension.loaded_networks[:] = listed
        model.current_lora_hash = merged
        for name, value in objects.items():
            setattr(model, name, value)

    return put_back
