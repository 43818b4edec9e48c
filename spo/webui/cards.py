"""What makes a LoRA a card in the WebUI's Lora tab: a preview picture with infotext, and a description."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.files import write_text, write_whole

if TYPE_CHECKING:
    from spo.webui.host import WebUIHost

_SD_VERSION = {"sd15": "SD1", "sdxl": "SDXL"}


def refresh_loras() -> None:
    """Let the WebUI find new LoRA files, so that prompts can use them at once."""
    networks = sys.modules.get("networks")  # of the built-in Lora extension
    if networks is not None:
        networks.list_available_networks()


def write_card(host: WebUIHost, path: Path) -> None:
    """Preview and description of a LoRA that was just saved, its adapter still in place. What exists already stays."""
    preview, facts = path.with_suffix(".png"), path.with_suffix(".json")
    if not facts.exists():
        write_text(facts, json.dumps(_facts(host, path), indent=4) + "\n")
    if not preview.exists():
        picture, infotext = _preview(host, path)
        write_whole(preview, lambda temporary: _save_png(picture, infotext, temporary))


def drop_cards_without_lora(stages_of: Path, kept: Sequence[Path]) -> None:
    """Remove the cards of stages whose LoRA file was removed by keep_last."""
    import glob

    stems = {path.stem for path in kept}
    for ending in (".json", ".png"):
        for path in stages_of.parent.glob(f"{glob.escape(stages_of.stem)}-step*{ending}"):
            if path.stem.removeprefix(f"{stages_of.stem}-step").isdigit() and path.stem not in stems:
                path.unlink(missing_ok=True)


def _facts(host: WebUIHost, path: Path) -> dict[str, Any]:
    config = host.config
    return {
        "description": f"SPO LoRA for {host.checkpoint_name}, preference model "
        f"{Path(config.preference.preference).name}, rank {config.lora.rank}.",
        "sd version": _SD_VERSION[host.architecture],
        "activation text": "",
        "preferred weight": 1.0,
        "notes": f"Made with sd-webui-spo; settings in {Path(config.run.output).stem}.spo.json.",
    }


def _preview(host: WebUIHost, path: Path) -> tuple[Any, str]:
    """One ordinary picture of the first sample prompt and its infotext, which names this LoRA."""
    from modules import processing

    config = host.config
    prompt = (list(config.run.sample_prompts) or host.prompts)[0]
    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=host.model,
        prompt=prompt,
        negative_prompt=config.prompt.negative_prompt,
        seed=config.run.sample_seed % 2**32,
        steps=len(host.ladder()) - 1,
        cfg_scale=config.rollout.guidance_scale,
        width=config.prompt.width,
        height=config.prompt.height,
        sampler_name="Euler a",
        scheduler="Automatic",
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    try:
        done = processing.process_images(p)
        p.prompts = p.all_prompts = [f"{prompt} <lora:{path.stem}:1>"]
        infotext = processing.create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds)
        return done.images[0], infotext
    finally:
        p.close()


def _save_png(picture: Any, infotext: str, path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("parameters", infotext)
    picture.save(path, format="PNG", pnginfo=told)
