"""Which preference model a name or a file means."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from spo.algorithm.preference import PreferenceModel
from spo.checkpoint.tensor_file import open_tensor_file
from spo.errors import SpoError
from spo.preference.catalogue import FILE_SUFFIXES, describe_opened, where_official
from spo.preference.mix import MixedScore, is_mix, mix_name, read_mix

DEMO_FILE = Path(__file__).parents[1] / "demo" / "preference.safetensors"


def load(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    architecture: str = "sd15",
) -> PreferenceModel:
    """The preference model of that name or in that file, frozen, on `device`.

    name_or_path  "demo"; a file or folder of a step-aware CLIP, of PickScore, of HPS, of an aesthetic head (its CLIP
                  beside it), of a taste head, or of a small latent model as the demo has it; a mix of these, as text
                  or file (see `mix`)
    dtype         of CLIP networks; the small latent model and the aesthetic head are always float32
    architecture  "sd15" or "sdxl", whose pictures it shall judge; a model made for the other one gets a warning, and
                  so does one that does not know the timestep

    Raises SpoError, one sentence, for a missing file and for one that is something else.
    """
    if is_mix(str(name_or_path)):
        parts = read_mix(str(name_or_path))
        models = [load(part.file, device=device, dtype=dtype, architecture=architecture) for part in parts]
        return MixedScore(parts, models, mix_name(parts))
    path = DEMO_FILE if str(name_or_path) == "demo" else Path(name_or_path).expanduser()
    if path.suffix.lower() not in FILE_SUFFIXES and not path.is_dir():
        raise SpoError(
            f'preference model "{name_or_path}" is not known; accepted are "demo" and the file of a preference model '
            f"({where_official(architecture)})."
        )
    if not path.exists():
        raise SpoError(_missing(path, architecture))
    from spo.preference.clip import scores as clip_scores

    file = open_tensor_file(clip_scores.weights_in(path))
    info = describe_opened(path, file)
    if advice := info.advice(architecture):
        warnings.warn(advice, stacklevel=2)
    if info.kind == "latent CNN":
        from spo.preference.latent_cnn import load_demo_taste

        return load_demo_taste(path, device)
    if info.kind == "taste head":
        from spo.preference.taste.head import read_taste

        return read_taste(file, device)
    if info.kind == "step-aware CLIP":
        from spo.preference.clip.step_aware import read_step_aware_clip

        return read_step_aware_clip(file, device=device, dtype=dtype)
    if info.kind == "CLIP score":
        return clip_scores.read_clip_score(path, device=device, dtype=dtype)
    return clip_scores.read_aesthetic_score(path, device=device, dtype=dtype)


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
    if path == DEMO_FILE:
        return f'the demo\'s preference model is missing: "{path}" belongs to this project, fetch it again.'
    return f'there is no preference model at "{path.absolute()}": put the file there ({where_official(architecture)}).'
