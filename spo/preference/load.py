"""Which preference model a name or a file means."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from spo.errors import SpoError
from spo.preference.protocol import PreferenceModel
from spo.tensor_file import open_tensor_file

OFFICIAL_FILES = {
    "sd15": "sd-v1-5_step-aware_preference_model.bin",
    "sdxl": "sdxl_step-aware_preference_model.bin",
}
OFFICIAL_REPOSITORY = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
_DEMO_FILE = Path(__file__).parents[1] / "demo" / "preference.safetensors"
_SPELLINGS = {"sdxl": re.compile(r"sd[-_ ]?xl", re.I), "sd15": re.compile(r"sd[-_ ]?v?1[-_. ]?[45](?!\d)", re.I)}


def load(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    architecture: str = "sd15",
) -> PreferenceModel:
    """The preference model of that name or in that file, frozen, on `device`.

    name_or_path  "demo", or a .safetensors or .bin file: a step-aware CLIP of the published layout, a taste head
                  fitted to votes, or a small latent model as the demo has it
    dtype         of a step-aware CLIP's network; the small latent models are always float32
    architecture  "sd15" or "sdxl", whose pictures it shall judge; a file named after the other one gets a warning

    Raises SpoError, one sentence, for a missing file and for one that is something else.
    """
    path = _DEMO_FILE if str(name_or_path) == "demo" else Path(name_or_path).expanduser()
    if path.suffix.lower() in (".safetensors", ".bin"):
        if not path.exists():
            raise SpoError(_missing(path, architecture))
        file = open_tensor_file(path)
        _warn_of_other_architecture(path, architecture)
        if file.metadata.get("spo_preference") == "latent_cnn":
            from spo.preference.demo_taste import load_demo_taste

            return load_demo_taste(path, device)
        if file.metadata.get("spo_preference") == "taste":
            from spo.preference.taste import read_taste

            head = read_taste(file, device)
            if head.facts.architecture != architecture:
                warnings.warn(
                    f'the taste head "{path.name}" was fitted to {head.facts.architecture} pictures, the checkpoint is '
                    f"{architecture}, whose latents mean something else: vote on this checkpoint's pictures.",
                    stacklevel=2,
                )
            return head
        from spo.preference.step_aware_clip import is_step_aware_clip, read_step_aware_clip

        if is_step_aware_clip(file):
            return read_step_aware_clip(file, device=device, dtype=dtype)
        raise SpoError(f'"{path.name}" {_what_it_is(file.tensors)}; a step-aware preference model is needed.')
    raise SpoError(
        f'preference model "{name_or_path}" is not known; accepted are "demo" and the .bin or .safetensors file of a '
        f"step-aware preference model ({_where_official(architecture)})."
    )


def scores_noisy_latents(name_or_path: str | Path) -> bool:
    """Whether this names a taste head, so that a rollout decodes nothing and evaluates only who goes on. For plans:
    False for all that `load` would refuse."""
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() != ".safetensors":
        return False
    try:
        return open_tensor_file(path).metadata.get("spo_preference") == "taste"
    except SpoError:
        return False


def _missing(path: Path, architecture: str) -> str:
    if path == _DEMO_FILE:
        return f'the demo\'s preference model is missing: "{path}" belongs to this project, fetch it again.'
    return f'there is no preference model at "{path.absolute()}": put the file there ({_where_official(architecture)}).'


def _where_official(architecture: str) -> str:
    name = OFFICIAL_FILES.get(architecture, " or ".join(OFFICIAL_FILES.values()))
    return f"the official one is {name} of huggingface.co/{OFFICIAL_REPOSITORY}"


def _warn_of_other_architecture(path: Path, architecture: str) -> None:
    named = [known for known, spelling in _SPELLINGS.items() if spelling.search(path.name)]
    if named and architecture not in named and architecture in OFFICIAL_FILES:
        warnings.warn(
            f'preference model "{path.name}" is named after {named[0]}, the checkpoint is {architecture}: it judges '
            f"predictions that it was not trained on; {_where_official(architecture)}.",
            stacklevel=3,
        )


def _what_it_is(names: Iterable[str]) -> str:
    """What a file without a time-modulated picture tower is, judged by its tensors' names."""
    names = list(names)

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if has("lora_unet_", "lora_te", ".lora_", "lycoris_", ".hada_w", ".lokr_w"):
        return "is a LoRA"
    if has("model.diffusion_model."):
        return "is a Stable Diffusion checkpoint"
    if has("blip."):
        return "is ImageReward, which was not trained on predictions at noise levels"
    if has("vision_model.", "visual.transformer.", "visual.conv1."):
        return "is a CLIP without time modulation (as PickScore and HPS), not trained on predictions at noise levels"
    if has("text_model.", "token_embedding"):
        return "is a text encoder"
    if has("decoder.conv_in.", "first_stage_model."):
        return "is a VAE"
    if has("input_blocks.", "down_blocks."):
        return "is a diffusion network"
    return f"holds something else (its first tensors: {', '.join(names[:3])})"
