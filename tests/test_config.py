"""The configuration: presets, validation, files."""

from __future__ import annotations

import dataclasses
import json

import pytest

from spo.config import PRESETS, build_config, read_config_file, settings
from spo.errors import SpoError


def test_the_papers_settings_are_the_presets():
    sd15, sdxl = build_config({}, "sd15"), build_config({}, "sdxl")
    assert dataclasses.astuple(sd15.rollout)[:6] == (20, "ddim", 1.0, 5.0, 4, 0)
    assert (sd15.rollout.divert_start_step, sd15.rollout.threshold) == (4, 0.3)
    assert (sd15.lora.rank, sd15.lora.alpha, sd15.optimizer.learning_rate) == (4, 4.0, 6e-5)
    assert (sd15.optimizer.prompts_per_batch, sd15.optimizer.epochs, sd15.optimizer.clip_norm) == (40, 10, 0)
    assert (sd15.optimizer.pairs_per_update, sd15.optimizer.accumulation) == (10, 4)  # 4 GPUs
    assert (sd15.loss.beta, sd15.loss.ratio_clamp, sd15.optimizer.weight_decay) == (10.0, 0.1, 1e-4)
    assert (sd15.prompt.width, sd15.prompt.height) == (512, 512)
    assert (sdxl.rollout.candidates, sdxl.rollout.inner_steps, sdxl.rollout.threshold) == (2, 3, 0.4)
    assert (sdxl.lora.rank, sdxl.lora.alpha, sdxl.optimizer.learning_rate) == (64, 64.0, 1e-5)
    optimizer = sdxl.optimizer
    assert (optimizer.prompts_per_batch, optimizer.pairs_per_update, optimizer.accumulation) == (8, 2, 8)  # 4 GPUs
    assert (sdxl.prompt.width, sdxl.prompt.height) == (1024, 1024)


def test_what_the_user_gives_wins_over_the_preset_and_comes_back_flat():
    config = build_config({"rank": 8, "alpha": 2, "modules": ["attention", "feed-forward"]}, "sdxl")
    assert (config.lora.rank, config.lora.alpha) == (8, 2.0)
    again = build_config(json.loads(json.dumps(config.flat())), "sdxl")
    assert again == config


def test_every_setting_has_a_hint_and_every_preset_names_settings():
    assert all(len(setting.help) > 3 for setting in settings().values())
    assert all(name in settings() for preset in PRESETS.values() for name in preset)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, 'setting "learning_rat" is not known, did you mean "learning_rate"?'),
        ({"candidates": 1}, "candidates is 1; accepted is 2 to 64."),
        ({"candidates": "four"}, "candidates is 'four'; it must be a whole number."),
        ({"candidates": 2.5}, "candidates is 2.5; it must be a whole number."),
        ({"candidates": True}, "it must be a whole number"),
        ({"threshold": float("nan")}, "threshold is nan; accepted is 0 to 1."),
        ({"learning_rate": "inf"}, "learning_rate is inf; accepted is 0 to 10."),
        ({"schedule": "cosin"}, 'schedule is "cosin"; accepted are constant, cosine, linear, did you mean "cosine"?'),
        ({"width": 500}, "width is 500 pixels; accepted are multiples of 8 from 64."),
        ({"modules": [1]}, "modules is [1]; it must be a list of texts."),
        ({"train_guidance": "yes"}, "it must be true or false"),
        ({"timestep_min": 700, "timestep_max": 300}, "timestep_min 700 is above timestep_max 300"),
        ({"prompts": 3}, "prompts is 3; it must be a text."),
    ],
)
def test_bad_values_are_named_with_what_is_accepted(values, message):
    with pytest.raises(SpoError) as caught:
        build_config(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is not valid JSON"),
        ("a.yaml", "a: [", "is not valid YAML"),
        ("a.yaml", "- 1", "holds a list"),
        ("a.toml", "", "must end in .json, .yaml or .yml"),
        ("missing.json", None, "cannot be read"),
    ],
)
def test_bad_configuration_files_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SpoError, match=message):
        read_config_file(tmp_path / name)


def test_reads_json_and_yaml(tmp_path):
    (tmp_path / "a.json").write_text('{"rank": 8}')
    (tmp_path / "a.yaml").write_text("rank: 8\nsigmas: [3.0, 1.0, 0.0]\n")
    assert read_config_file(tmp_path / "a.json") == {"rank": 8}
    assert build_config(read_config_file(tmp_path / "a.yaml")).rollout.sigmas == "3.0,1.0,0.0"
