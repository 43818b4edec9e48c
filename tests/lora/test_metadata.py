"""What the metadata of a LoRA file says."""

from __future__ import annotations

import dataclasses
import json

import pytest

from spo.errors import SpoError
from spo.lora.metadata import lora_metadata
from tests.loras import FACTS


def test_metadata_of_sd15() -> None:
    config = {"beta": 10.0, "modules": ["attention"], "prompts": "Füße.txt"}
    found = lora_metadata("name", FACTS)
    assert json.loads(found.pop("spo_config")) == config
    assert found.pop("spo_version")
    assert found == {
        "ss_output_name": "name",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": "model.safetensors",
        "ss_sd_model_hash": "0123456789",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
        "ss_training_started_at": "1700000000.25",
        "ss_training_finished_at": "1700000100.0",
        "ss_learning_rate": "6e-05",
        "ss_unet_lr": "6e-05",
        "ss_steps": "30",
        "ss_num_epochs": "2",
        "ss_seed": "7",
        "ss_total_batch_size": "10",
        "ss_mixed_precision": "fp16",
        "ss_resolution": "(512, 512)",
        "ss_tag_frequency": "{}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "name",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.date": "2023-11-14T22:15:00+00:00",
        "spo_run_id": "run",
    }


def test_metadata_of_sdxl() -> None:
    facts = dataclasses.replace(
        FACTS, architecture="sdxl", prediction_type="v_prediction", precision="float32", checkpoint_hash="ab" * 32,
        width_px=832, height_px=1216, tag_frequency={"prompts": {"cat": 2}}, run_id="",
    )  # fmt: skip
    found = lora_metadata("name", facts)
    assert all(isinstance(value, str) for value in found.values())
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_hash": "ababababab",
        "ss_new_sd_model_hash": "ab" * 32,
        "ss_mixed_precision": "no",
        "ss_resolution": "(832, 1216)",
        "ss_tag_frequency": '{"prompts": {"cat": 2}}',
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "832x1216",
        "modelspec.prediction_type": "v",
    }
    assert expected.items() <= found.items()
    assert "spo_run_id" not in found
    assert "ss_sd_model_hash" not in lora_metadata("name", dataclasses.replace(facts, checkpoint_hash=""))


@pytest.mark.parametrize(
    ("name", "value"), [("architecture", "sd3"), ("prediction_type", "flow"), ("precision", "int8")]
)
def test_metadata_refuses_unknown_words(name: str, value: str) -> None:
    with pytest.raises(SpoError, match=f'{name} "{value}".*choose from'):
        lora_metadata("name", dataclasses.replace(FACTS, **{name: value}))
