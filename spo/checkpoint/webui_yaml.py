"""What a WebUI yaml beside a checkpoint adds to its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spo.checkpoint.tensor_file import refuse
from spo.errors import SpoError, nearest

PredictionType = Literal["epsilon", "v_prediction"]

_PREDICTION_WORDS: dict[str, PredictionType] = {
    "epsilon": "epsilon", "eps": "epsilon",
    "v_prediction": "v_prediction", "v": "v_prediction", "v-prediction": "v_prediction", "vpred": "v_prediction",
}  # fmt: skip


@dataclass(frozen=True)
class NoiseSchedule:
    """The training schedule's betas: square roots ("scaled_linear") or themselves ("linear") from start to end."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"


@dataclass(frozen=True)
class YamlHints:
    """What a WebUI yaml adds to the tensors; 0 or None where it says nothing."""

    path: Path | None = None
    prediction_type: PredictionType | None = None
    unet_heads: int = 0
    unet_head_width: int = 0
    scale_factor: float = 0.0
    schedule: NoiseSchedule = NoiseSchedule()
    text_folders: tuple[Path | None, ...] = ()


def yaml_hints(checkpoint: Path, config_path: Path | str | None) -> YamlHints:
    path = checkpoint.with_suffix(".yaml") if config_path is None else Path(config_path)
    if not path.is_file():
        if config_path is not None:
            raise SpoError(f'there is no configuration file "{path}"')
        return YamlHints()
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpoError(f'"{path}" is not a readable yaml file') from error
    params = _child(content, "model", "params")
    if not params:
        refuse(path, "is not a Stable Diffusion configuration: it has no model.params")
    network = _child(params, "unet_config", "params") or _child(params, "network_config", "params")
    try:
        head_width = int(network.get("num_head_channels") or 0)
        return YamlHints(
            path=path,
            prediction_type=_yaml_prediction(params),
            unet_heads=max(0, int(network.get("num_heads") or 0)),
            unet_head_width=max(0, head_width),
            scale_factor=float(params.get("scale_factor") or 0.0),
            schedule=NoiseSchedule(
                float(params.get("linear_start", NoiseSchedule.beta_start)),
                float(params.get("linear_end", NoiseSchedule.beta_end)),
            ),
            text_folders=tuple(_version_folder(path, embedder) for embedder in _text_embedders(params)),
        )
    except (TypeError, ValueError) as error:
        raise SpoError(f'"{path}" has a value of the wrong kind: {error}') from error


def _child(tree: Any, *names: str) -> dict[str, Any]:
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _yaml_prediction(params: dict[str, Any]) -> PredictionType | None:
    scaling = _child(params, "denoiser_config", "params", "scaling_config").get("target")
    if isinstance(scaling, str):
        return "v_prediction" if scaling.rsplit(".", 1)[-1].startswith("V") else "epsilon"
    word = params.get("parameterization")
    return None if word is None else prediction_word(str(word), "parameterization in the yaml")


def _text_embedders(params: dict[str, Any]) -> list[dict[str, Any]]:
    if "cond_stage_config" in params:
        return [_child(params, "cond_stage_config", "params")]
    models = _child(params, "conditioner_config", "params").get("emb_models")
    return [_child(model, "params") for model in models[:2]] if isinstance(models, list) else []


def _version_folder(yaml_path: Path, embedder: dict[str, Any]) -> Path | None:
    version = embedder.get("version")
    folder = yaml_path.parent / str(version)
    return folder if version and (folder / "config.json").is_file() else None


def prediction_word(word: str, what: str) -> PredictionType:
    prediction_type = _PREDICTION_WORDS.get(word.strip().lower())
    if prediction_type is None:
        choices = ("epsilon", "v_prediction")
        raise SpoError(f'{what} "{word}" is not known{nearest(word, choices)} (accepted: epsilon, v_prediction)')
    return prediction_type
