"""Which judge a LoRA's training followed, and which prompts it knows."""

from __future__ import annotations

import json
import shutil

import pytest

from spo.errors import SpoError
from spo.evaluation.provenance import CHOSE, FOLLOWED, UNKNOWN, UNSEEN, Training, role, training_of
from spo.preference.load import BUNDLED, BUNDLED_FILES
from tests.loras import SD15_QUERY, kohya, layer, save

NONE = frozenset()


def test_roles_by_content_and_by_name(tmp_path):
    copy = tmp_path / "renamed.safetensors"
    shutil.copy(BUNDLED_FILES[BUNDLED], copy)
    demo = Training("demo", NONE)
    assert role("demo", [demo]) == FOLLOWED
    assert role(str(copy), [demo]) == FOLLOWED, "the same weights"
    assert role("demo-adherence", [demo]) == UNSEEN
    assert role("demo", [Training(f"0.5*{copy} + 0.5*gone.safetensors", NONE)]) == FOLLOWED
    assert role("elsewhere/spm.bin", [Training("/their/disk/spm.bin", NONE)]) == FOLLOWED, "both files are gone"
    assert role("demo", [Training("", NONE)]) == UNKNOWN
    assert role("demo-adherence", [demo, Training("", NONE)]) == UNKNOWN
    assert role("demo", []) == UNKNOWN


def test_a_judge_that_chose_the_stage_is_not_one_that_training_never_saw(tmp_path):
    config = {"preference": "demo", "judge": "demo-judge", "adherence": "none"}
    training = training_of(lora(tmp_path / "mine.safetensors", config))
    assert training == Training("demo", NONE, ("demo-judge",))
    assert role("demo-judge", [training]) == CHOSE
    assert role("demo-adherence", [training]) == UNSEEN
    assert role("demo-judge", [training, Training("demo-judge", NONE)]) == FOLLOWED
    assert role("demo-judge", [training, Training("", NONE)]) == UNKNOWN


def lora(path, config=None):
    metadata = {} if config is None else {"spo_config": json.dumps(config)}
    return save(path, kohya(SD15_QUERY, layer()), metadata or None)


def test_a_run_tells_its_preference_model_and_its_prompts(tmp_path):
    stage = lora(tmp_path / "mine-step000100.safetensors", {"preference": "demo", "prompts": "gone.txt"})
    (tmp_path / "mine.spo").mkdir()
    (tmp_path / "mine.spo" / "prompts.json").write_text('["a fox", "a boat"]')
    assert training_of(stage) == Training("demo", frozenset({"a fox", "a boat"}))
    elsewhere = tmp_path / "runs" / "mine.spo"
    assert training_of(stage, elsewhere) == Training("demo", NONE)


def test_prompts_are_read_from_the_file_that_training_named(tmp_path):
    (tmp_path / "prompts.txt").write_text("a pear\n")
    config = {"preference": "spm.bin", "prompts": str(tmp_path / "prompts.txt")}
    assert training_of(lora(tmp_path / "mine.safetensors", config)) == Training("spm.bin", frozenset({"a pear"}))


def test_settings_beside_a_file_whose_metadata_are_gone(tmp_path):
    (tmp_path / "mine.spo.json").write_text('{"preference": "demo"}')
    assert training_of(lora(tmp_path / "mine.safetensors")).preference == "demo"
    (tmp_path / "mine.spo.json").write_text("not JSON")
    assert training_of(tmp_path / "mine.safetensors") == Training("", NONE)


def test_what_is_no_lora_is_refused(tmp_path):
    (tmp_path / "none.safetensors").write_text("text")
    with pytest.raises(SpoError, match="none.safetensors"):
        training_of(tmp_path / "none.safetensors")
