"""Where things lie in the WebUI's folders: LoRAs and runs, preference models, the bundled prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from spo.config import NATIVE_SIZE_PX
from spo.demo.install import FILE_NAME as DEMO_CHECKPOINT
from spo.errors import SpoError, nearest
from spo.preference.load import (
    BUNDLED,
    BUNDLED_FILES,
    MIX,
    PreferenceInfo,
    describe_preference,
    list_preference_models,
)
from spo.presets import preset
from spo.runs.layout import FOLDER_SUFFIX, RunFiles, split_stage
from spo.training.judges import AUTO, NONE
from spo.webui.seam import webui

_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f,]')
_MAX_BYTES = 200  # file systems take 255; a stage's name and that of a file being written are longer
BUNDLED_PROMPTS = Path(__file__).parents[1] / "demo" / "prompts.txt"


def preference_folder() -> Path:
    """Where preference models are looked for: models/SPO."""
    return webui.models_folder() / "SPO"


def placeless(text: str) -> str:
    """`text` with the WebUI's folders by their names: where they are on this machine is nobody's business."""
    for folder in sorted({*webui.lora_folders(), webui.models_folder()}, key=lambda one: -len(str(one))):
        text = text.replace(str(folder), folder.name)
    return text


def plain_name(name: str, what: str) -> str:
    """A name that a file or folder of ours may have, on every system: letters, digits, spaces, - _ and dots inside.

    what  it is called in the SpoError
    """
    text = (name or "").strip()
    good = text and all(letter.isalnum() or letter in " _-." for letter in text)
    if not good or text[0] == "." or text[-1] == "." or len(text.encode("utf-8", "replace")) > _MAX_BYTES:
        raise SpoError(f'{what} is "{text[:80]}"; give letters, digits, spaces, - and _.')
    if text.split(".")[0].strip().lower() in _RESERVED:
        raise SpoError(f'{what} is "{text}", which Windows keeps for itself; give another one.')
    return text


def lora_path(name: str) -> Path:
    """The file of a LoRA's name, which may begin with a folder in the LoRA folder ("mine/vivid").

    Raises SpoError for a name that leaves the LoRA folder, or that prompts or file systems do not take.
    """
    text = name.strip().removesuffix(".safetensors")
    rule = 'give a name such as "my-style", in which / may stand for folders in the LoRA folder'
    parts = text.split("/")
    if not text or len(text) > 150 or _FORBIDDEN.search(text) or PurePosixPath(text).is_absolute():
        raise SpoError(f'LoRA name "{name[:80]}" cannot be used; {rule}.')
    for part in parts:
        bad = not part or part != part.strip() or part.startswith(".") or part.endswith(".")
        bad = bad or len(part.encode("utf-8", "replace")) > _MAX_BYTES
        if bad or part.split(".")[0].strip().lower() in _RESERVED:
            raise SpoError(f'LoRA name "{name[:80]}" cannot be used because of "{part}"; {rule}.')
    folder = webui.lora_folder().resolve()
    path = folder.joinpath(*parts[:-1], f"{parts[-1]}.safetensors")
    if not path.parent.resolve().is_relative_to(folder):
        raise SpoError(f'LoRA name "{name[:80]}" leads out of the LoRA folder; {rule}.')
    return path


def lora_name(path: Path) -> str:
    """The inverse of `lora_path`, as the file is called there, be it a link; LyCORIS/NAME for one of the old folder."""
    main, *others = [webui.lora_folder(), *webui.lora_folders()[1:]]
    stem = path.absolute().with_suffix("")
    for place, folder in ((stem, main), (path.resolve().with_suffix(""), main.resolve())):
        if place.is_relative_to(folder):
            return place.relative_to(folder).as_posix()
    for folder in others:
        if stem.is_relative_to(folder):
            return f"{folder.name}/{stem.relative_to(folder).as_posix()}"
    return path.stem


def lora_files() -> dict[str, Path]:
    """The .safetensors files that the WebUI finds, by name (`lora_name`), sorted."""
    return {lora_name(path): path for path in sorted(webui.lora_files(".safetensors"))}


def lora_file(name: str) -> Path:
    """The existing LoRA file of a name of `lora_files`. SpoError for another name, also for a path."""
    files = lora_files()
    if name not in files:
        lora_path(name)  # what is no name at all gets its own sentence
        raise SpoError(f'There is no LoRA "{name[:80]}" in the LoRA folder{nearest(name, files)}.')
    return files[name]


def free_name(wanted: str, taken: Sequence[str] = ()) -> str:
    """`wanted`, or the first of wanted-2, wanted-3 ... without a LoRA or a run, and not among those taken."""
    for number in range(1, 1000):
        name = wanted if number == 1 else f"{wanted}-{number}"
        path = lora_path(name)
        if name not in taken and not path.exists() and not run_folder(name).exists():
            return name
    raise SpoError(f'there are a thousand LoRAs called "{wanted}" already; choose another name.')


def run_folder(name: str) -> Path:
    """Where the run of a LoRA name is kept: models/SPO/runs, so that the Lora tab shows no folders of ours."""
    path = lora_path(name)
    return preference_folder() / "runs" / f"{lora_name(path)}{FOLDER_SUFFIX}"


def run_files(name: str) -> RunFiles:
    """The files of the run of a LoRA name."""
    return RunFiles(lora_path(name), run_folder(name))


def run_names() -> list[str]:
    """LoRA names that have a run folder, newest first."""
    place, runs = preference_folder() / "runs", []
    for folder in place.rglob(f"*{FOLDER_SUFFIX}"):
        with suppress(FileNotFoundError, NotADirectoryError):  # never begun, or deleted meanwhile
            begun = RunFiles(Path(), folder).config.stat().st_mtime
            runs.append((begun, folder.relative_to(place).as_posix().removesuffix(FOLDER_SUFFIX)))
    return [name for _, name in sorted(runs, reverse=True)]


def lora_names() -> list[str]:
    """Every LoRA file in the folder, those that SPO trained first (they have settings or stages), then by name."""
    runs = set(run_names())
    return sorted(lora_files(), key=lambda name: (not {name, split_stage(name)[0]} & runs, name.lower()))


def preference_choices() -> list[str]:
    """Names of preference models: "demo", then what models/SPO holds."""
    return [BUNDLED, *(info.path.name for info in preference_models())]


def preference_models() -> Sequence[PreferenceInfo]:
    """The preference models that models/SPO holds."""
    folder = preference_folder()
    return list_preference_models(folder).models if folder.exists() else ()


def picture_judge_choices() -> list[str]:
    """Names of judges of finished pictures: those of the demo, then what models/SPO holds."""
    return [*BUNDLED_FILES, *preference_choices()[1:]]


def picture_judge_path(name: str) -> str:
    """What `preference.load` takes for a name of `picture_judge_choices`; SpoError as `preference_path`."""
    name = name.strip()
    return name if name in BUNDLED_FILES else preference_path(name)


def usual_preference(architecture: str, file_name: str) -> str:
    """The preference model to begin with on a checkpoint in this file; "" when none here fits.

    The demo's on the demo checkpoint only. Else of those made for the architecture a step-aware CLIP, then a taste
    head, the newest first; then those that do not know the timestep. Never one made for the other architecture.
    """
    if file_name == DEMO_CHECKPOINT:
        return BUNDLED
    order = ("step-aware CLIP", "taste head", MIX, "CLIP score", "aesthetic score")
    fitting = [
        info for info in preference_models() if info.kind in order and info.architecture in ("any", architecture)
    ]
    fitting.sort(key=lambda info: (order.index(info.kind), info.architecture == "any", -info.path.stat().st_mtime))
    return fitting[0].path.name if fitting else ""


def usual_size_px(architecture: str, file_name: str) -> int:
    """The side of a checkpoint's own pictures, in pixels; those of the demo in this file are small."""
    return int(preset("demo").values["width"]) if file_name == DEMO_CHECKPOINT else NATIVE_SIZE_PX[architecture]


def preference_text(name: str, architecture: str) -> str:
    """What the page says of a preference model of that name, with warnings for the loaded checkpoint."""

    if not name:
        return ""
    try:
        info = describe_preference(preference_path(name))
    except SpoError as error:
        return str(error)
    only_demo = "For the demo checkpoint only. " if name == BUNDLED else ""
    return f"{info.text()}. {only_demo}{info.advice(architecture)}".strip()


def preference_path(name: str) -> str:
    """What `preference.load` takes for a name of `preference_choices`; "" stays "".

    SpoError for any other name: no field may open, or find out about, a file elsewhere on this machine.
    """
    name = name.strip()
    if not name or name == BUNDLED:
        return name
    choices = preference_choices()
    if name not in choices:
        raise SpoError(f'There is no preference model "{name[:80]}" in models/SPO{nearest(name, choices)}.')
    return str(preference_folder() / name)


def stage_judge_choices() -> list[str]:
    """What can judge the stages of a run: "auto", "none", and all that judge pictures but the demo's own model."""
    return [AUTO, NONE, *picture_judge_choices()[1:]]


def stage_judge_path(name: str) -> str:
    """What `training.judges` takes for a name of `stage_judge_choices`. SpoError as `preference_path`."""
    return name.strip() if name.strip() in (AUTO, NONE) else picture_judge_path(name)


def labelled_pairs(name: str) -> Path:
    """The folder or parquet file in models/SPO/pairs, or, where nobody else uses this WebUI, anywhere.

    Raises SpoError for a path where the page is open to others (--listen, --share ...) or folders are not to be chosen
    on it (--hide-ui-dir-config), and for a place on another machine, which asking alone would give the user's
    credentials to.
    """
    text = name.strip()
    if text.startswith(("\\\\", "//")):
        raise SpoError(f'"{text[:80]}" is on another machine; copy the pairs into models/SPO/pairs.')
    place = Path(os.path.normpath(preference_folder() / "pairs"))
    inside = Path(os.path.normpath(place / text))  # an absolute path, or one with .., leads out of it
    if inside.is_relative_to(place) and inside.exists():
        return inside
    if webui.open_to_others():
        raise SpoError(
            f'"{text[:80]}" cannot be opened from here; name a folder or a parquet file in models/SPO/pairs.'
        )
    return Path(text).expanduser()


def bundled_prompts() -> str:
    """The bundled list, one prompt a line."""
    return BUNDLED_PROMPTS.read_text(encoding="utf-8")
