"""Flags for settings, and which value wins."""

from __future__ import annotations

import json

import pytest

from spo.cli.main import parser
from spo.cli.settings_flags import given_values, require
from spo.config import settings
from spo.errors import SpoError
from spo.runs.layout import RunFiles


def given(*arguments):
    return given_values(parser().parse_args(arguments))


def test_every_setting_has_a_flag_in_both_spellings():
    flags = {flag for action in parser().parse_args(["train"]).parser._actions for flag in action.option_strings}
    for name in settings():
        assert {f"--{name}", f"--{name.replace('_', '-')}"} <= flags


def test_values_of_every_kind():
    values = given("train", "--rank", "3", "--replace", "--no-small-decode", "--modules", "attention", "convolution")
    assert values == {"rank": "3", "replace": True, "small_decode": False, "modules": ["attention", "convolution"]}
    assert given("compare", "--checkpoint", "a") == {"checkpoint": "a"}


def test_flags_win_over_the_file_over_the_resumed_run_over_the_preset(tmp_path):
    run = RunFiles.of(tmp_path / "a.safetensors")
    run.folder.mkdir()
    run.config.write_text(json.dumps({"rank": 1, "steps": 2, "seed": 3}))
    (tmp_path / "run.json").write_text(json.dumps({"rank": 4, "steps": 5}))
    asked = ["train", "--preset", "quick", "--output", str(run.output)]
    assert given(*asked, "--rank", "2") | {"steps": 0} == given(*asked) | {"rank": "2", "steps": 0}
    assert given(*asked, "--rank", "2")["sampling_steps"] == 12
    resumed = [*asked, "--resume", "--config", str(tmp_path / "run.json"), "--rank", "6"]
    assert {name: given(*resumed)[name] for name in ("rank", "steps", "seed", "sampling_steps")} == {
        "rank": "6", "steps": 5, "seed": 3, "sampling_steps": 12
    }  # fmt: skip


def test_what_is_missing_is_named():
    require({"checkpoint": "a"}, "checkpoint")
    with pytest.raises(SpoError, match="--prompts is missing; give it as a flag or in the --config file"):
        require({"checkpoint": "a", "prompts": ""}, "checkpoint", "prompts")
