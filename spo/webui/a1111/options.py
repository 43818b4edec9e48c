"""The WebUI's folders, flags and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def lora_folder() -> Path:
    """--lora-dir, or models/Lora."""
    from modules import shared

    return Path(shared.cmd_opts.lora_dir).absolute()


def models_folder() -> Path:
    """The WebUI's models/."""
    from modules import paths_internal

    return Path(paths_internal.models_path).absolute()


def checkpoint_folder() -> Path | None:
    """--ckpt-dir; None when checkpoints are in models/Stable-diffusion only."""
    from modules import shared

    folder = getattr(shared.cmd_opts, "ckpt_dir", None)  # neo lacks the flag
    return Path(folder) if folder else None


def refresh_checkpoints() -> None:
    """Let the WebUI find new checkpoint files."""
    from modules import shared

    shared.refresh_checkpoints()


def device() -> torch.device:
    """Where the WebUI computes."""
    from modules import shared

    return shared.device


@dataclass(frozen=True)
class Card:
    """The graphics card that the WebUI computes on. total_gib: its memory."""

    name: str
    total_gib: float


def card() -> Card | None:
    """The CUDA card in use; None on anything else."""
    place = device()
    if place.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(place)
    return Card(found.name, found.total_memory / 2**30)


def open_to_others() -> bool:
    """Whether others may use the page, or are not to choose folders on it: no path that they give is opened then."""
    from modules import shared

    flags = shared.cmd_opts
    names = ("listen", "share", "ngrok", "server_name", "hide_ui_dir_config")
    return any(bool(getattr(flags, name, None)) for name in names)


def clip_skip() -> int:
    """The Clip skip setting: 1 is the text encoder's last layer."""
    from modules import shared

    return int(shared.opts.CLIP_stop_at_last_layers)


def api_wanted() -> bool:
    """Whether the WebUI serves an API at all (--api or --nowebui)."""
    from modules import shared

    return bool(shared.cmd_opts.api or shared.cmd_opts.nowebui)


def api_auth() -> bool:
    """Whether the API asks for credentials (--api-auth)."""
    from modules import shared

    return bool(shared.cmd_opts.api_auth)


def api_credentials() -> list[bytes]:
    """The "user:password" of --api-auth in UTF-8, each of which opens the API."""
    from modules import shared

    pairs = [pair.strip() for pair in (shared.cmd_opts.api_auth or "").split(",")]
    return [pair.encode("utf-8", "surrogateescape") for pair in pairs if ":" in pair]


def style_names() -> list[str]:
    """The user's styles, without the headings that the WebUI keeps among them, which have no text."""
    from modules import shared

    return [name for name, style in shared.prompt_styles.styles.items() if style.prompt is not None]


def with_styles(prompt: str, names: Sequence[str], *, negative: bool = False) -> str:
    """A positive or negative prompt with these styles put on."""
    from modules import shared

    styles = shared.prompt_styles
    apply = styles.apply_negative_styles_to_prompt if negative else styles.apply_styles_to_prompt
    return str(apply(prompt, list(names)))


def option(name: str) -> Any:
    """A value of the WebUI's settings; None for a name that it does not know."""
    from modules import shared

    return getattr(shared.opts, name, None)
