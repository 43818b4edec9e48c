"""Preference models: one table of the kinds there are, and which model a name, a file or a folder means.

Another kind is a module with a class and a reader, and one row in `KINDS`: lists, plans, errors and `load` follow.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from spo.algorithm.preference import PreferenceModel
from spo.checkpoint import kinds
from spo.checkpoint.hashes import short_hash
from spo.checkpoint.tensor_file import TensorFile
from spo.config import Config
from spo.errors import SpoError
from spo.files import size_text
from spo.preference import latent_reward, subject_score
from spo.preference.clip import scores
from spo.preference.clip.step_aware import StepAwareCLIP, is_step_aware_clip, read_step_aware_clip
from spo.preference.cnn_file import is_cnn, read_cnn
from spo.preference.latent_cnn import LatentCNN
from spo.preference.mix import SUFFIXES, MixedScore, is_mix, mix_name, read_mix
from spo.preference.official import OFFICIAL_FILES, official_architecture, where_official
from spo.preference.pickles import in_half, open_model_file, reads_pickles_safely
from spo.preference.pixel_cnn import PixelCNN
from spo.preference.placement import Placement, placement
from spo.preference.small_decode import SmallDecode
from spo.preference.taste import head

# ---------------------------------------------------------------------------------------------- the table


class Recognises(Protocol):
    """Whether a file, of which only names, shapes and metadata were read, holds a model of some kind."""

    def __call__(self, file: TensorFile, /) -> bool: ...


class Reads(Protocol):
    """The frozen model in a file of its kind, called `name`, at its place. Raises SpoError for a damaged file."""

    def __call__(self, file: TensorFile, name: str, place: Placement, /) -> PreferenceModel: ...


@dataclass(frozen=True)
class Kind:
    """One kind of preference model: all that is known about it before its weights are read.

    name            what lists and errors call it
    recognises, reads  see there
    model           its class, whose `needs_pixels` and `needs_denoised` say what it looks at
    knows_timestep  whether it was trained on predictions at noise levels, and so on those of one architecture
    """

    name: str
    recognises: Recognises
    reads: Reads
    model: type[PreferenceModel]
    knows_timestep: bool

    @property
    def sees(self) -> str:
        """ "pixels" (a rollout needs the VAE), "denoised latents", or "noisy latents" (nothing is evaluated for it)."""
        return _sees(self.model)


KINDS = (  # the first that recognises a file is its kind
    Kind("latent CNN", partial(is_cnn, LatentCNN), partial(read_cnn, LatentCNN), LatentCNN, True),
    Kind("taste head", head.is_taste, head.read_taste, head.TasteHead, True),
    Kind("latent reward model", latent_reward.is_latent_reward, latent_reward.read_latent_reward,
         latent_reward.LatentReward, True),
    Kind("step-aware CLIP", is_step_aware_clip, read_step_aware_clip, StepAwareCLIP, True),
    Kind("CLIP score", scores.is_plain_clip, scores.read_clip_score, scores.ClipScore, False),
    Kind("aesthetic score", scores.is_aesthetic_head, scores.read_aesthetic_score, scores.AestheticScore, False),
    Kind("pixel CNN", partial(is_cnn, PixelCNN), partial(read_cnn, PixelCNN), PixelCNN, False),
    Kind("subject score", subject_score.is_subject_classifier, subject_score.read_subject_score,
         subject_score.SubjectScore, False),
)  # fmt: skip
MIX = "mix"  # of some of these; its file holds no tensors

FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
BUNDLED = "demo"  # what the demo trains on, by the name that stands for its file
_DEMO = Path(__file__).parents[1] / "demo"
BUNDLED_FILES = {  # for the demo checkpoint's pictures alone; the judges are not for training
    BUNDLED: _DEMO / "preference.safetensors",
    "demo-judge": _DEMO / "judge.safetensors",
    "demo-adherence": _DEMO / "subject_classifier.safetensors",
}

DEMO_CHECKPOINTS = ("demo", "spo-demo")  # its file's names here and in the WebUI, without .safetensors

_SPELLINGS = {"sdxl": re.compile(r"sd[-_ ]?xl", re.I), "sd15": re.compile(r"sd[-_ ]?v?1[-_. ]?[45](?!\d)", re.I)}

NO_TIME = (
    "This model does not know the timestep and scores the predicted picture: in the paper plain PickScore used so "
    "ended below the untrained checkpoint (PickScore 20.28 against 20.53; step-aware 21.43)."
)


# ---------------------------------------------------------------------------------------------- loading


def load(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    precision: str = "auto",
    rest_on_cpu: bool = False,
    architecture: str = "sd15",
    finished: bool = False,
) -> PreferenceModel:
    """The preference model of that name or in that file, frozen, on `device`.

    name_or_path  a name of `BUNDLED_FILES`, such as "demo"; a file of one of `KINDS`, or a folder as transformers saves
                  it; a mix of these, as text or file (see `mix`)
    precision, rest_on_cpu  see `placement`
    architecture  "sd15" or "sdxl", whose pictures it shall judge; a model made for the other one gets a warning, and
                  so does one that does not know the timestep
    finished      it shall judge finished pictures alone, for which it need not know the timestep

    Raises SpoError, one sentence, for a missing file, for one that is something else, and for a precision that the
    device cannot compute in.
    """
    if is_mix(str(name_or_path)):
        parts = read_mix(str(name_or_path))
        models = [
            load(
                part.file,
                device=device,
                precision=precision,
                rest_on_cpu=rest_on_cpu,
                architecture=architecture,
                finished=finished,
            )
            for part in parts
        ]
        return MixedScore(parts, models, mix_name(parts))
    path = _path_of(name_or_path)
    if path.suffix.lower() not in FILE_SUFFIXES and not path.is_dir():
        names = ", ".join(f'"{name}"' for name in (BUNDLED_FILES if finished else (BUNDLED,)))
        raise SpoError(
            f'preference model "{name_or_path}" is not known; accepted are {names} and the file of a preference '
            f"model ({where_official(architecture)})."
        )
    if not path.exists():
        raise SpoError(_missing(path, architecture))
    place = placement(device, precision, rest_on_cpu=rest_on_cpu)
    weights = _weights_in(path)
    file = open_model_file(in_half(weights) if place.dtype != torch.float32 else weights)
    kind = kind_of(file)
    if advice := _describe_file(path, file, kind).advice(architecture, finished=finished):
        warnings.warn(advice, stacklevel=2)
    name = next((name for name, bundled in BUNDLED_FILES.items() if path == bundled), _name(path))
    return kind.reads(file, name, place)


def load_preference(
    config: Config, device: torch.device, architecture: str, say: Callable[[str], object] = lambda text: None
) -> PreferenceModel:
    """The preference model of a run's configuration. say: told how well `small_decode` agrees."""
    model = load(
        config.preference.preference,
        device=device,
        precision=config.preference.preference_precision,
        rest_on_cpu=config.model.rest_on_cpu,
        architecture=architecture,
    )
    return SmallDecode(model, say) if config.preference.small_decode and model.needs_pixels else model


def check_made_for(name_or_path: str | Path, checkpoint_name: str) -> None:
    """Raise SpoError for a model of `BUNDLED_FILES`, or a mix with one, on another checkpoint than the demo's.

    checkpoint_name  of its file, with or without suffix
    """
    text = str(name_or_path)
    for file in [part.file for part in read_mix(text)] if is_mix(text) else [text]:
        if file in BUNDLED_FILES and checkpoint_name.removesuffix(".safetensors") not in DEMO_CHECKPOINTS:
            raise SpoError(
                f'"{file}" knows the demo checkpoint\'s pictures only; the checkpoint is {checkpoint_name}, so choose '
                "another model."
            )


def fingerprint(name_or_path: str) -> str:
    """What tells one preference model from another, whatever its file is called: a hash of its weights; of a mix, those
    of its models with their shares. "" where there is no such file. Raises SpoError for one that cannot be read.
    """
    if not name_or_path:
        return ""
    if is_mix(name_or_path):
        parts = read_mix(name_or_path)
        return " + ".join(f"{part.weight:g}/{part.deviation:g}*{fingerprint(part.file)}" for part in parts)
    path = _path_of(name_or_path)
    return short_hash(_weights_in(path)) if path.exists() else ""


def kind_of(file: TensorFile) -> Kind:
    """Which of `KINDS` a file holds. Raises SpoError saying what it is instead."""
    kind = recognised(file)
    if kind is None:
        other = kinds.kind_of(file)
        lacking = " that lacks its text tower, a projection or its logit scale" if other.family == "clip" else ""
        raise SpoError(f'"{file.path.name}" is {other.text}{lacking}; a preference model is needed.')
    return kind


def recognised(file: TensorFile) -> Kind | None:
    """Which of `KINDS` a file holds, or None."""
    return next((kind for kind in KINDS if kind.recognises(file)), None)


def _path_of(name_or_path: str | Path) -> Path:
    return BUNDLED_FILES.get(str(name_or_path)) or Path(name_or_path).expanduser()


def _weights_in(path: Path) -> Path:
    """The file of weights that a path means. Raises SpoError for a folder that holds none that is read as it is."""
    if latent_reward.is_published_folder(path):
        raise SpoError(
            f'the folder "{path}" is a latent reward model as it was published: make one file of it by '
            f'`python run.py convert-preference "{path}"`, outside the WebUI.'
        )
    return scores.weights_in(path)


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _missing(path: Path, architecture: str) -> str:
    if path in BUNDLED_FILES.values():
        return f'the demo\'s preference model is missing: "{path}" belongs to this project, fetch it again.'
    return f'there is no preference model at "{path.absolute()}": put the file there ({where_official(architecture)}).'


# ---------------------------------------------------------------------------------------------- describing


@dataclass(frozen=True)
class PreferenceInfo:
    """One preference model as a list shows it.

    path            the file or folder; for a mix its description
    kind            the name of one of `KINDS`, or `MIX`
    size_bytes      of the weights; of a mix, of its models together
    sees            see `Kind`
    knows_timestep  whether it was trained on predictions at noise levels; of a mix, all of its models
    architecture    "sd15", "sdxl" or "any": whose predictions it was trained on
    """

    path: Path
    name: str
    kind: str
    size_bytes: int
    sees: str
    knows_timestep: bool
    architecture: str

    def text(self) -> str:
        """One line: name, size, what it sees, timestep, architecture."""
        time = "knows the timestep" if self.knows_timestep else "without timestep"
        made_for = "any checkpoint" if self.architecture == "any" else f"for {self.architecture}"
        return f"{self.name} ({self.kind}, {size_text(self.size_bytes)}, sees {self.sees}, {time}, {made_for})"

    def advice(self, architecture: str, *, finished: bool = False) -> str:
        """Warnings for use on a checkpoint of that architecture, in whole sentences; empty when all is well.

        finished  it judges finished pictures alone
        """
        sentences = [] if self.knows_timestep or finished else [f'"{self.name}": {NO_TIME}']
        if self.architecture not in ("any", architecture):
            sentences.append(
                f'preference model "{self.name}" was made for {self.architecture}, the checkpoint is {architecture}: '
                f"it judges predictions that it was not trained on; {where_official(architecture)}."
            )
        return " ".join(sentences)


@dataclass(frozen=True)
class PreferenceList:
    """models: the preference models of a folder, by name; refused: one sentence for each other file."""

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
    if place.is_file() or is_model_folder(place):
        return PreferenceList((describe_preference(place),), ())
    models, refused = [], []
    for path in sorted(place.iterdir(), key=lambda path: path.name.lower()):
        suffix = path.suffix.lower()
        if not (suffix in (*FILE_SUFFIXES, *SUFFIXES) or is_model_folder(path)):
            continue
        if suffix in SUFFIXES and not _looks_like_mix(path):
            continue
        try:
            models.append(describe_preference(path))
        except SpoError as error:
            refused.append(str(error))
    return PreferenceList(tuple(models), tuple(refused))


def describe_preference(name_or_path: str | Path) -> PreferenceInfo:
    """What the model is that `load` would read; no weights are read. SpoError for anything else."""
    if is_mix(str(name_or_path)):
        return _describe_mix(str(name_or_path))
    path = _path_of(name_or_path)
    architecture = official_architecture(path)
    if architecture is not None and not reads_pickles_safely():  # by its name: opening means hashing 5.2 GB before
        return PreferenceInfo(path, path.stem, "step-aware CLIP", path.stat().st_size, "pixels", True, architecture)
    file = open_model_file(_weights_in(path))
    return _describe_file(path, file, kind_of(file))


def _describe_file(path: Path, file: TensorFile, kind: Kind) -> PreferenceInfo:
    architecture = "any"
    if kind.knows_timestep:
        stated = file.metadata.get("architecture", "")
        architecture = stated if stated in OFFICIAL_FILES else named_after(path.name) or "any"
    return PreferenceInfo(
        path, _name(path), kind.name, file.size_bytes, kind.sees, kind.knows_timestep, architecture
    )  # fmt: skip


def _describe_mix(text: str) -> PreferenceInfo:
    parts = read_mix(text)
    models = [describe_preference(part.file) for part in parts]
    architectures = {model.architecture for model in models} - {"any"}
    path = Path(text)
    is_file = path.suffix.lower() in SUFFIXES
    return PreferenceInfo(
        path,
        f"{path.stem}: {mix_name(parts)}" if is_file else mix_name(parts),
        MIX,
        sum(model.size_bytes for model in models),
        next(sees for sees in ("pixels", "denoised latents", "noisy latents") if sees in {m.sees for m in models}),
        all(model.knows_timestep for model in models),
        architectures.pop() if len(architectures) == 1 else "any",
    )


def _sees(model: PreferenceModel | type[PreferenceModel]) -> str:
    return "pixels" if model.needs_pixels else "denoised latents" if model.needs_denoised else "noisy latents"


def named_after(name: str) -> str | None:
    """The architecture that a file's name mentions, if it mentions one alone."""
    named = [architecture for architecture, spelling in _SPELLINGS.items() if spelling.search(name)]
    return named[0] if len(named) == 1 else None


def is_model_folder(path: Path) -> bool:
    """Whether transformers saved a model in the folder, or it is a latent reward model's."""
    return any((path / name).is_file() for name in scores.WEIGHT_NAMES) or latent_reward.is_published_folder(path)


def _looks_like_mix(path: Path) -> bool:
    try:
        return path.stat().st_size < 100_000 and "models" in path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
