"""What makes a LoRA a card in the WebUI's Lora tab: a preview picture with infotext, and a description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.files import write_text, write_whole
from spo.runs.layout import RunFiles

if TYPE_CHECKING:
    from spo.webui.host import WebUIHost
    from spo.webui.seam import webui

_SD_VERSION = {"sd15": "SD1", "sdxl": "SDXL"}


def write_card(host: WebUIHost, path: Path) -> None:
    """Preview and description of a LoRA that was just saved, its adapter still in place. What exists already stays."""
    preview, facts = path.with_suffix(".png"), path.with_suffix(".json")
    if not facts.exists():
        write_text(facts, json.dumps(_facts(host, path), indent=4) + "\n")
    if not preview.exists():
        made = _preview(host, path)
        write_whole(preview, lambda temporary: _save_png(made.images[0], made.infotext, temporary))


def drop_cards_without_lora(files: RunFiles) -> None:
    """Remove the cards of stages whose LoRA file was removed by keep_last."""
    stems = {path.stem for path in files.stages()}
    for ending in (".json", ".png"):
        for path in files.stages(ending):
            if path.stem not in stems:
                path.unlink(missing_ok=True)


def _facts(host: WebUIHost, path: Path) -> dict[str, Any]:
    config = host.config
    return {
        "description": f"SPO LoRA for {host.checkpoint_name}, preference model "
        f"{Path(config.preference.preference).name}, rank {config.lora.rank}.",
        "sd version": _SD_VERSION[host.architecture],
        "activation text": "",
        "preferred weight": 1.0,
        "notes": f"Made with sd-webui-spo; settings in {RunFiles.of(config.run.output).settings.name}.",
    }


def _preview(host: WebUIHost, path: Path) -> webui.Pictures:
    """One ordinary picture of the first sample prompt, with an infotext that names this LoRA."""
    run = host.config.run
    prompt = (list(run.sample_prompts) or host.prompts)[0]
    return host.picture(prompt, run.sample_seed, infotext_prompt=f"{prompt} <lora:{path.stem}:1>")


def _save_png(picture: Any, infotext: str, path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("parameters", infotext)
    picture.save(path, format="PNG", pnginfo=chunks)
