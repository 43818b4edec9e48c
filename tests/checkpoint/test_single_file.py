"""Checkpoints in one file, and where their prediction type comes from."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from spo.checkpoint.inspect import inspect_checkpoint
from spo.errors import SpoError
from tests.crafted_files import HERE, craft, shapes_of
from tests.tiny_checkpoints import (
    write_tiny_sd15,
)


def test_tiny_checkpoints(sd15: Path, sdxl: Path) -> None:
    info = inspect_checkpoint(sd15)
    assert (info.unet.channels, info.unet.depths, info.unet.res_blocks) == ((32, 32, 64, 64), (1, 1, 1, 0), 1)
    assert info.parameters == info.unet_parameters + info.vae_parameters + info.text_parameters > 1e6
    assert not info.zero_terminal_snr and info.config_path is None
    info = inspect_checkpoint(str(sdxl))
    assert (info.architecture, info.unet.heads, len(info.text_encoders)) == ("sdxl", (1, 1, 1), 2)


def test_nothing_heavy_is_imported(sd15: Path) -> None:
    code = f"""
    import sys
    from spo.checkpoint.info import describe
    from spo.checkpoint.inspect import inspect_checkpoint
    describe(inspect_checkpoint({str(sd15)!r}))
    assert not {{"torch", "diffusers", "transformers"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=HERE.parent)


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
