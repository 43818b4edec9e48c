"""LoRAs as the fork keeps them: patches of the loaded model, read from a file once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from spo.webui import a1111

_OBJECTS = ("forge_objects", "forge_objects_after_applying_lora")


def refresh_loras() -> None:
    """Let the WebUI find new LoRA files, and read anew those that have changed under the same name."""
    from modules import sd_models

    a1111.refresh_loras()
    extension, model = sys.modules.get("networks"), sd_models.model_data.sd_model
    if extension is not None:
        extension.load_lora_state_dict.cache_clear()  # it keeps the last five by their file names
    if model is not None:
        model.current_lora_hash = ""  # of the names that are merged; as they are, it would merge none again


def active_networks(model: Any) -> Callable[[], None]:
    """What makes the LoRAs of now the model's again; weights follow when they are used."""
    extension = sys.modules.get("networks")
    loaded = list(getattr(extension, "loaded_networks", []))
    digest, objects = model.current_lora_hash, {name: getattr(model, name).shallow_copy() for name in _OBJECTS}

    def put_back() -> None:
        if extension is not None:
            extension.loaded_networks[:] = loaded
        model.current_lora_hash = digest
        for name, value in objects.items():
            setattr(model, name, value)

    return put_back
