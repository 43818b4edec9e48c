"""Checkpoints as diffusers saves them."""

from __future__ import annotations

from pathlib import Path

import pytest

from spo.checkpoint.info import describe
from spo.checkpoint.inspect import inspect_checkpoint
from spo.errors import SpoError
from tests.crafted_files import change, refused
from tests.tiny_checkpoints import (
    tiny_sd15,
    write_diffusers_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_diffusers_folder(tmp_path / "model", tiny_sd15())


def test_folder(folder: Path, sd15: Path) -> None:
    info, expected = inspect_checkpoint(folder), inspect_checkpoint(sd15)
    assert info.is_folder and info.prediction_source == "from the scheduler's configuration"
    assert (info.unet, info.vae, info.scale_factor) == (expected.unet, expected.vae, expected.scale_factor)
    assert (info.unet_parameters, info.vae_parameters) == (expected.unet_parameters, expected.vae_parameters)
    assert info.text_encoders == expected.text_encoders and info.schedule == expected.schedule
    assert "diffusers folder" in describe(info)[1]
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    info = inspect_checkpoint(folder)
    assert info.prediction_type == "v_prediction" and info.zero_terminal_snr
    assert inspect_checkpoint(folder, prediction_type="epsilon").prediction_type == "epsilon"


def test_folder_with_parts_missing(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(folder / "unet" / "kept")
    with pytest.raises(SpoError, match=r'unet" has a config.json but no weights'):
        inspect_checkpoint(folder)
    (folder / "unet" / "kept").rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert inspect_checkpoint(folder).unet_parameters > 0
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(SpoError, match=r'vae" has no config.json'):
        inspect_checkpoint(folder)
    (folder / "vae").rename(folder / "other")
    (folder / "text_encoder").rename(folder / "other2")
    refused(folder, "diffusers folder without vae/ and text_encoder/")
    with pytest.raises(SpoError, match="brings its own configuration"):
        inspect_checkpoint(folder, config_path=folder / "x.yaml")


def test_folders_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    config = folder / "unet" / "config.json"
    kept = config.read_text()
    for values, message in (
        ({"cross_attention_dim": 1024}, "Stable Diffusion 2.x"),
        ({"in_channels": 9}, "SD 1.x inpainting checkpoint with 9"),
        ({"in_channels": 8}, "instruct-pix2pix"),
        ({"in_channels": 5}, "SD 1.x checkpoint with 5"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 1280}, "SDXL refiner"),
        ({"addition_embed_type": "text_time"}, "without text_encoder_2/"),
        ({"block_out_channels": None}, "incomplete or damaged configuration"),
    ):
        change(config, **values)
        refused(folder, message)
        config.write_text(kept)
    config.write_text("{")
    with pytest.raises(SpoError, match="not a readable JSON file"):
        inspect_checkpoint(folder)
    for name in ("StableDiffusion3Pipeline", "FluxPipeline"):
        change(folder / "model_index.json", _class_name=name)
        refused(folder, f"for {name}; only SD 1.x and SDXL")
    (tmp_path / "models").mkdir()
    refused(tmp_path / "models", "without unet/")
    (tmp_path / "models" / "a.safetensors").write_bytes(b"")
    refused(tmp_path / "models", "give one of its files, such as .*a.safetensors")
