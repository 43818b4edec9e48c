"""What preference models there are in a folder, and what a file is that is none: for lists and for errors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spo.checkpoint.tensor_file import TensorFile, open_tensor_file
from spo.errors import SpoError
from spo.preference.mix import SUFFIXES, mix_name, read_mix

KINDS = ("step-aware CLIP", "taste head", "latent CNN", "CLIP score", "aesthetic score", "mix")
FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
OFFICIAL_FILES = {
    "sd15": "sd-v1-5_step-aware_preference_model.bin",
    "sdxl": "sdxl_step-aware_preference_model.bin",
}
OFFICIAL_REPOSITORY = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
_SPELLINGS = {"sdxl": re.compile(r"sd[-_ ]?xl", re.I), "sd15": re.compile(r"sd[-_ ]?v?1[-_. ]?[45](?!\d)", re.I)}


@dataclass(frozen=True)
class PreferenceInfo:
    """One preference model as a list shows it.

    path            the file or folder; for a mix its description
    kind            one of `KINDS`
    size_bytes      of the weights; of a mix, of its models together
    space           "pixels" (needs the VAE) or "latents"
    knows_timestep  whether it was trained on predictions at noise levels
    architecture    "sd15", "sdxl" or "any": whose predictions it was trained on
    """

    path: Path
    name: str
    kind: str
    size_bytes: int
    space: str
    knows_timestep: bool
    architecture: str

    def text(self) -> str:
        """One line: name, size, space, timestep, architecture."""
        time = "knows the timestep" if self.knows_timestep else "without timestep"
        made_for = "any checkpoint" if self.architecture == "any" else f"for {self.architecture}"
        return f"{self.name} ({self.kind}, {size_text(self.size_bytes)}, {self.space}, {time}, {made_for})"

    def advice(self, architecture: str) -> str:
        """Warnings for use on a checkpoint of that architecture, in whole sentences; empty when all is well."""
        from spo.preference.clip.scores import NO_TIME

        said = [] if self.knows_timestep else [f'"{self.name}": {NO_TIME}']
        if self.architecture not in ("any", architecture):
            said.append(mismatch(self.name, self.architecture, architecture))
        return " ".join(said)


@dataclass(frozen=True)
class PreferenceList:
    """models: what was found, by name; refused: one sentence for each other file."""

    models: tuple[PreferenceInfo, ...]
    refused: tuple[str, ...]


def list_preference_models(place: Path) -> PreferenceList:
    """The preference models in a folder (not below it), or the one in a file or in a folder of one model.

    Only headers of .safetensors files are read; of a pickle its tensor index. Raises SpoError for a missing place and
    for a single file that is no preference model, saying what it is.
    """
    place = place.expanduser()
    if not place.exists():
        raise SpoError(f'there is no file or folder "{place.absolute()}" with preference models.')
    if place.is_file() or _is_model_folder(place):
        return PreferenceList((describe_preference(place),), ())
    models, refused = [], []
    for path in sorted(place.iterdir(), key=lambda path: path.name.lower()):
        suffix = path.suffix.lower()
        if not (suffix in (*FILE_SUFFIXES, *SUFFIXES) or (path.is_dir() and _is_model_folder(path))):
            continue
        if suffix in SUFFIXES and not _looks_like_mix(path):
            continue
        try:
            models.append(describe_preference(path))
        except SpoError as error:
            refused.append(str(error))
    return PreferenceList(tuple(models), tuple(refused))


def describe_preference(path: Path) -> PreferenceInfo:
    """What the preference model in a file, or in a folder as transformers saves it, is. SpoError for anything else."""
    from spo.preference.clip.scores import weights_in

    if path.suffix.lower() in SUFFIXES and path.is_file():
        return _describe_mix(path)
    return describe_opened(path, open_tensor_file(weights_in(path)))


def describe_opened(path: Path, file: TensorFile) -> PreferenceInfo:
    """The same for a file that is open already; path: what the user named, the file itself or its folder."""
    kind = kind_of(file)
    timed = kind in ("latent CNN", "taste head", "step-aware CLIP")
    told = file.metadata.get("architecture", "")
    architecture = told if told in OFFICIAL_FILES else named_after(path.name) or "any"
    return PreferenceInfo(
        path,
        path.name if path.is_dir() else path.stem,
        kind,
        file.size_bytes,
        "latents" if kind in ("latent CNN", "taste head") else "pixels",
        timed,
        architecture if timed else "any",
    )


def kind_of(file: TensorFile) -> str:
    """Which of `KINDS` (but a mix) a file holds. Raises SpoError saying what it is instead."""
    from spo.preference.clip.scores import is_aesthetic_head, is_plain_clip
    from spo.preference.clip.step_aware import is_step_aware_clip

    if file.metadata.get("spo_preference") == "latent_cnn":
        return "latent CNN"
    if file.metadata.get("spo_preference") == "taste":
        return "taste head"
    if is_step_aware_clip(file):
        return "step-aware CLIP"
    if is_plain_clip(file):
        return "CLIP score"
    if is_aesthetic_head(file):
        return "aesthetic score"
    raise SpoError(f'"{file.path.name}" {_what_it_is(file.tensors)}; a preference model is needed.')


def named_after(name: str) -> str | None:
    """The architecture that a file's name mentions, if it mentions one alone."""
    named = [known for known, spelling in _SPELLINGS.items() if spelling.search(name)]
    return named[0] if len(named) == 1 else None


def mismatch(name: str, made_for: str, architecture: str) -> str:
    """The warning for a model that was trained on another architecture's predictions."""
    return (
        f'preference model "{name}" was made for {made_for}, the checkpoint is {architecture}: it judges '
        f"predictions that it was not trained on; {where_official(architecture)}."
    )


def where_official(architecture: str) -> str:
    """Where the published step-aware model for an architecture is found."""
    name = OFFICIAL_FILES.get(architecture, " or ".join(OFFICIAL_FILES.values()))
    return f"the official one is {name} of huggingface.co/{OFFICIAL_REPOSITORY}"


def _describe_mix(path: Path) -> PreferenceInfo:
    parts = read_mix(str(path))
    from spo.preference.load import DEMO_FILE

    found = [describe_preference(DEMO_FILE if part.file == "demo" else Path(part.file)) for part in parts]
    architectures = {info.architecture for info in found} - {"any"}
    return PreferenceInfo(
        path,
        f"{path.stem}: {mix_name(parts)}",
        "mix",
        sum(info.size_bytes for info in found),
        "pixels" if any(info.space == "pixels" for info in found) else "latents",
        all(info.knows_timestep for info in found),
        architectures.pop() if len(architectures) == 1 else "any",
    )


def _is_model_folder(path: Path) -> bool:
    from spo.preference.clip.scores import WEIGHT_NAMES

    return path.is_dir() and any((path / name).is_file() for name in WEIGHT_NAMES)


def _looks_like_mix(path: Path) -> bool:
    try:
        return path.stat().st_size < 100_000 and "models" in path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def size_text(count: int) -> str:
    """Bytes as people read them: 5.22 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1e3:.0f} kB"


def _what_it_is(names: Iterable[str]) -> str:
    """What a file that is no preference model is, judged by its tensors' names."""
    names = list(names)

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if has("lora_unet_", "lora_te", ".lora_", "lycoris_", ".hada_w", ".lokr_w"):
        return "is a LoRA"
    if has("model.diffusion_model."):
        return "is a Stable Diffusion checkpoint"
    if has("blip."):
        return "is ImageReward, which is not supported"
    if has("vision_model.", "visual.transformer.", "visual.conv1."):
        return "is a CLIP that lacks its text tower, a projection or its logit scale"
    if has("text_model.", "token_embedding"):
        return "is a text encoder"
    if has("decoder.conv_in.", "first_stage_model."):
        return "is a VAE"
    if has("input_blocks.", "down_blocks."):
        return "is a diffusion network"
    if "emb_params" in names or set(names) == {"clip_l", "clip_g"}:
        return "is a textual inversion embedding"
    return f"holds something else (its first tensors: {', '.join(names[:3])})"
