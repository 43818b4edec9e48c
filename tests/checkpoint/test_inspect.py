"""What every checkpoint is asked, file or folder: where its prediction type comes from, and what brings its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from spo.checkpoint.inspect import inspect_checkpoint
from spo.errors import SpoError
from tests.crafted_files import craft, shapes_of
from tests.tiny_checkpoints import tiny_sd15, write_diffusers_folder, write_tiny_sd15

SGM_V = "denoiser_config: {params: {scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling}}}"
SGM_EPS = SGM_V.replace("VScaling", "EpsScaling")


@pytest.mark.parametrize(
    ("metadata", "marker", "params", "argument", "expected"),
    [
        ({}, False, None, None, "epsilon"),
        ({"modelspec.prediction_type": "v"}, False, None, None, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, True, None, None, "epsilon"),
        ({}, True, None, None, "v_prediction"),
        ({}, True, None, "epsilon", "epsilon"),
        ({}, False, "parameterization: v", None, "v_prediction"),
        ({"modelspec.prediction_type": "v"}, False, "parameterization: eps", None, "epsilon"),
        ({}, False, SGM_V, None, "v_prediction"),
        ({}, True, SGM_EPS, None, "epsilon"),
        ({}, False, "scale_factor: 0.2", "v_prediction", "v_prediction"),
    ],
)
def test_prediction_type(
    tmp_path: Path, sd15: Path, metadata: dict[str, str], marker: bool, params: str | None, argument: str | None,
    expected: str,
) -> None:  # fmt: skip
    shapes = shapes_of(sd15) | ({"v_pred": (0,), "ztsnr": (0,)} if marker else {})
    path = craft(tmp_path / "x.safetensors", shapes, metadata=metadata)
    if params:
        (tmp_path / "x.yaml").write_text(f"model: {{params: {{{params}}}}}" if "{" in params else
                                         f"model:\n  params:\n    {params}\n")  # fmt: skip
    info = inspect_checkpoint(path, prediction_type=argument)
    assert info.prediction_type == expected
    assert info.zero_terminal_snr == marker
    assert info.scale_factor == (0.2 if params and "scale" in params else 0.18215)


def test_v_prediction_of_the_tiny_writer(tmp_path: Path) -> None:
    for ending in ("safetensors", "ckpt"):
        path = write_tiny_sd15(tmp_path / f"v.{ending}", prediction_type="v_prediction")
        assert inspect_checkpoint(path).prediction_type == "v_prediction"


def test_unknown_prediction_words(tmp_path: Path, sd15: Path) -> None:
    with pytest.raises(SpoError, match='prediction type "v_predictoin" is not known, did you mean "v_prediction"'):
        inspect_checkpoint(sd15, prediction_type="v_predictoin")
    path = craft(tmp_path / "s.safetensors", shapes_of(sd15), metadata={"modelspec.prediction_type": "sample"})
    with pytest.raises(SpoError, match='modelspec.prediction_type in s.safetensors "sample" is not known'):
        inspect_checkpoint(path)


def test_a_yaml_beside_the_file_or_one_that_is_given(tmp_path: Path, sd15: Path) -> None:
    path = craft(tmp_path / "x.safetensors", shapes_of(sd15))
    other = tmp_path / "elsewhere" / "v.yaml"
    other.parent.mkdir()
    other.write_text("model: {params: {parameterization: v}}")
    assert inspect_checkpoint(path).config_path is None
    info = inspect_checkpoint(path, config_path=other)
    assert (info.config_path, info.prediction_type) == (other, "v_prediction")
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: eps}}")
    assert inspect_checkpoint(path).config_path == path.with_suffix(".yaml")
    assert inspect_checkpoint(path, config_path=other).prediction_type == "v_prediction"


def test_a_damaged_folder_is_named_and_takes_no_yaml(tmp_path: Path) -> None:
    folder = write_diffusers_folder(tmp_path / "model", tiny_sd15())
    with pytest.raises(SpoError, match='"model" is a diffusers folder.*leave the yaml away'):
        inspect_checkpoint(folder, config_path=tmp_path / "x.yaml")
    (folder / "unet" / "config.json").write_text("{}")
    with pytest.raises(SpoError, match='model" has an incomplete or damaged configuration'):
        inspect_checkpoint(folder)
