"""What is inside a checkpoint, told from the names, shapes and dtypes of its tensors; no network is built.

Everything else (prediction type, attention heads) comes from a WebUI yaml beside the file, the file's
metadata and marker tensors, or Stable Diffusion's usual values. What is not a Stable Diffusion 1.x or SDXL
text-to-image checkpoint is refused with one sentence saying what it is.

Layouts: a single file with LDM / sgm names, as the WebUI uses them, or a folder as diffusers saves it.
"""

from __future__ import annotations

from pathlib import Path

from spo.checkpoint.folder import inspect_folder
from spo.checkpoint.info import CheckpointInfo
from spo.checkpoint.single_file import inspect_single_file
from spo.checkpoint.tensor_file import refuse
from spo.checkpoint.webui_yaml import prediction_word
from spo.errors import SpoError


def inspect_checkpoint(
    path: Path | str, *, config_path: Path | str | None = None, prediction_type: str | None = None
) -> CheckpointInfo:
    """What the checkpoint at `path` is: a .safetensors or .ckpt file, or a diffusers folder.

    config_path      a WebUI yaml; default: the one of the same name beside the file, if there is one
    prediction_type  overrides what is found: "epsilon" or "v_prediction"

    Prediction type: the argument, else the yaml (`parameterization: v`, sgm's VScaling), else the metadata
    `modelspec.prediction_type`, else a marker tensor `v_pred`, else epsilon.
    Heads of the UNet: the yaml's `num_heads` or `num_head_channels`, else 8 heads (SD1.x) or 64 channels a head (SDXL).
    Heads of a text encoder: width / 64, or the `num_attention_heads` of a transformers config.json: at
    NAME.text_encoder_config.json (second encoder: text_encoder_2_config.json), in the folder that the yaml names as
    the encoder's `version`, or at text_encoder_config.json beside the checkpoint if the sizes agree.

    Raises SpoError, one sentence, for everything that is not such a checkpoint.
    """
    path = Path(path)
    override = None if prediction_type is None else prediction_word(prediction_type, "prediction type")
    if path.is_dir():
        if config_path is not None:
            refuse(path, "is a diffusers folder, which brings its own configuration; leave the yaml away")
        try:
            return inspect_folder(path, override)
        except (KeyError, TypeError, ValueError) as error:
            raise SpoError(f'"{path}" has an incomplete or damaged configuration ({error})') from error
    return inspect_single_file(path, config_path, override)
