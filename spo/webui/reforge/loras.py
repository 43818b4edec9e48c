"""LoRA files, which the fork reads once."""

from __future__ import annotations

from spo.webui import a1111
from spo.webui.a1111.loras import lora_extension


def refresh_loras() -> None:
    """Let the WebUI find new LoRA files, and read anew those that have changed under the same name."""
    from modules import sd_models

    a1111.refresh_loras()
    extension, model = lora_extension(), sd_models.model_data.sd_model
    if extension is not None:
        extension.load_lora_state_dict.cache_clear()  # it keeps the last five by their file names
    if model is not None:
        model.current_lora_hash = ""  # of the names that are merged; as they are, it would merge none again
