"""LoRAs and hypernetworks: the files that prompts know, and the active ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.webui.a1111.options import lora_folder


def lora_folders() -> list[Path]:
    """Where the WebUI looks for LoRA files: --lora-dir, and the LyCORIS folder of old when it is there."""
    from modules import shared

    old = getattr(shared.cmd_opts, "lyco_dir_backcompat", None)  # of the Lora extension, which may be off
    folders = [lora_folder(), *([Path(old).absolute()] if old else [])]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def lora_files(*endings: str) -> list[Path]:
    """The files with these endings in `lora_folders`, as the WebUI finds them: also through links."""
    from modules import shared

    return [
        Path(file) for folder in lora_folders() for file in shared.walk_files(str(folder), allowed_extensions=endings)
    ]


@dataclass(frozen=True)
class KnownLora:
    """A LoRA file as prompts know it: by its stem. metadata: the file's."""

    file: Path
    metadata: Mapping[str, Any]


def known_loras() -> dict[str, KnownLora] | None:
    """By the name in prompts. None: the WebUI's Lora extension is switched off."""
    extension = lora_extension()
    if extension is None:
        return None
    return {
        name: KnownLora(Path(entry.filename), entry.metadata) for name, entry in extension.available_networks.items()
    }


def refresh_loras() -> None:
    """Let the WebUI find new LoRA files, so that prompts can use them at once."""
    extension = lora_extension()
    if extension is not None:
        extension.list_available_networks()


def lora_extension() -> Any:
    """The module `networks` of the built-in Lora extension, None when it is off. Imported by the WebUI, never by us."""
    return sys.modules.get("networks")


def active_networks() -> list[Callable[[], None]]:
    """What makes the hypernetworks and LoRAs of now active again, at their multipliers; weights follow when used."""
    from modules import shared

    def reactivation(active: list[Any]) -> Callable[[], None]:
        before = [(network, dict(vars(network))) for network in active]

        def put_back() -> None:
            active[:] = [network for network, _ in before]
            for network, values in before:
                vars(network).update(
                    {key: value for key, value in values.items() if "multiplier" in key or key == "dyn_dim"}
                )

        return put_back

    lora = lora_extension()
    return [reactivation(active) for active in (shared.loaded_hypernetworks, getattr(lora, "loaded_networks", []))]
