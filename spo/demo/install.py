"""Put the demo checkpoint where the WebUI finds it, so that everything can be tried before gigabytes are downloaded.

The WebUI needs three things: the checkpoint, a yaml of the same name beside it (the networks are smaller than Stable
Diffusion 1's), and the folder that the yaml names for the tokenizer and the text encoder's sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spo.errors import SpoError
from spo.files import named_when_whole

HERE = Path(__file__).parent
TOKENIZER = HERE.parent / "clip_tokenizer"
TOKENIZER_FILES = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
PLACEHOLDER = "CLIP_DIR_HERE"
NAME = "spo-demo"
FILE_NAME = f"{NAME}.safetensors"


@dataclass(frozen=True)
class DemoInstalled:
    """Where the demo is in the WebUI.

    checkpoint, config, text_encoder  two files and a folder
    written                           the files that were not there before
    """

    checkpoint: Path
    config: Path
    text_encoder: Path
    written: tuple[Path, ...]

    def text(self) -> str:
        """Where it is, and what to do next."""
        state = "checkpoint  " if self.written else "already there  "
        prompts = (HERE / "prompts_heldout.txt").read_text(encoding="utf-8").split("\n")[:3]
        return (
            f"{state}{self.checkpoint}\n"
            f'In the WebUI, refresh the list "Stable Diffusion checkpoint" and choose {NAME}; '
            f"draw with 64 x 64 pixels, Euler a, 20 steps, CFG scale 5.\n"
            f"Prompts to begin with: {'; '.join(prompts)}."
        )


def models_folder(webui: Path) -> Path:
    """The models folder of a WebUI's folder, or of its --data-dir. Raises SpoError when it is neither."""
    models = webui.expanduser().absolute() / "models"
    if not (models / "Stable-diffusion").is_dir():
        raise SpoError(f'"{webui}" is not a WebUI folder: there is no folder models/Stable-diffusion in it.')
    return models


def install_demo(models: Path, checkpoints: Path | None = None) -> DemoInstalled:
    """Write what is not there yet; a file that is there with other content stops it before anything is written.

    models       the WebUI's models folder (`modules.paths.models_path`), an existing one
    checkpoints  where its checkpoints are (`--ckpt-dir`); default: Stable-diffusion in `models`

    Raises SpoError when a folder or a file cannot be made, or a file of that name has other content.
    """
    checkpoints = (checkpoints or models / "Stable-diffusion").expanduser().absolute()
    text_encoder = models.expanduser().absolute() / "SPO" / "demo_text_encoder"
    checkpoint, config = checkpoints / f"{NAME}.safetensors", checkpoints / f"{NAME}.yaml"
    contents = {text_encoder / name: (TOKENIZER / name).read_bytes() for name in TOKENIZER_FILES}
    contents[text_encoder / "config.json"] = (HERE / "text_encoder_config.json").read_bytes()
    contents[config] = config_text(text_encoder).encode()
    contents[checkpoint] = (HERE / "demo.safetensors").read_bytes()  # last: the WebUI lists it, then all is there
    if not models.expanduser().is_dir():
        raise SpoError(f'"{models}" is not a folder; the models folder of a WebUI is wanted.')
    return DemoInstalled(checkpoint, config, text_encoder, _write_new(contents))


def config_text(text_encoder: Path) -> str:
    """The checkpoint's yaml with the text encoder's folder in it."""
    path = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(text_encoder))  # for OmegaConf ${...} is a reference; \${...} is text
    quoted = "'" + path.replace("'", "''") + "'"  # in YAML's single quotes only the quote itself is special
    return (HERE / "demo.yaml").read_text(encoding="utf-8").replace(PLACEHOLDER, quoted)


def _write_new(contents: Mapping[Path, bytes]) -> tuple[Path, ...]:
    """The files that were not there, written in the mapping's order."""
    path = Path()
    try:
        new = []
        for path, content in contents.items():
            if not path.exists():
                new.append(path)
            elif not path.is_file() or path.read_bytes() != content:
                raise SpoError(f'"{path}" is there already with other content; move or rename it, then try again.')
        for path in new:
            path.parent.mkdir(parents=True, exist_ok=True)
            with named_when_whole(path, replace=False) as temporary:
                temporary.write_bytes(contents[path])
    except OSError as error:
        raise SpoError(f'the demo cannot be put into the WebUI: "{path}": {error.strerror}.') from error
    return tuple(new)
