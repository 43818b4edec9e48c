"""A checkpoint in one file, with the LDM or sgm names that the WebUI uses."""

from __future__ import annotations

from pathlib import Path

from spo.checkpoint.info import SCALE_FACTOR, CheckpointInfo, dtypes, parameters
from spo.checkpoint.kinds import UNET_PREFIX, VAE_PREFIX, kind_of
from spo.checkpoint.shapes import text_encoder_shapes, unet_shape, vae_shape
from spo.checkpoint.tensor_file import TensorFile, open_tensor_file, refuse
from spo.checkpoint.webui_yaml import PredictionType, YamlHints, prediction_word, yaml_hints


def inspect_single_file(path: Path, config_path: Path | str | None, override: PredictionType | None) -> CheckpointInfo:
    """See `inspect.inspect_checkpoint`. override: the prediction type to take, whatever the file says."""
    return inspect_tensors(open_tensor_file(path), config_path, override)


def inspect_tensors(
    file: TensorFile, config_path: Path | str | None, override: PredictionType | None
) -> CheckpointInfo:
    """`inspect_single_file` of an index of tensors, of a file that need not be opened, or of a model in memory."""
    path, kind = file.path, kind_of(file)
    if kind.architecture is None:
        refuse(path, f"is {kind.text}; a text-to-image checkpoint of SD 1.x or SDXL is needed")
    architecture = kind.architecture
    hints = yaml_hints(path, config_path)
    prediction, source = _prediction(file, hints, override)
    parts = [parameters(file.tensors, prefix) for prefix in (UNET_PREFIX, VAE_PREFIX, "cond")]
    return CheckpointInfo(
        path=path,
        is_folder=False,
        architecture=architecture,
        prediction_type=prediction,
        prediction_source=source,
        zero_terminal_snr="ztsnr" in file.tensors,
        unet=unet_shape(file, architecture, hints),
        vae=vae_shape(file, VAE_PREFIX) if f"{VAE_PREFIX}decoder.conv_in.weight" in file.tensors else None,
        text_encoders=text_encoder_shapes(file, architecture, hints),
        scale_factor=hints.scale_factor or SCALE_FACTOR[architecture],
        schedule=hints.schedule,
        dtypes=dtypes(file.tensors, UNET_PREFIX),
        size_bytes=file.size_bytes,
        unet_parameters=parts[0],
        vae_parameters=parts[1],
        text_parameters=parts[2],
        config_path=hints.path,
    )


def _prediction(file: TensorFile, hints: YamlHints, override: PredictionType | None) -> tuple[PredictionType, str]:
    if override is not None:
        return override, "as asked for"
    if hints.prediction_type is not None:
        return hints.prediction_type, "from the yaml"
    if word := file.metadata.get("modelspec.prediction_type"):
        return prediction_word(word, f"modelspec.prediction_type in {file.path.name}"), "from the file's metadata"
    if "v_pred" in file.tensors:
        return "v_prediction", "from the file's v_pred mark"
    return "epsilon", "the usual one, the file says nothing"
