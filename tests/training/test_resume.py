"""What must be the same when a run goes on, and what may change."""

from __future__ import annotations

import json

import pytest

from spo.config import settings
from spo.errors import SpoError
from spo.progress import Watcher
from spo.training.loop import train
from spo.training.resume import FREE
from tests.tiny_host import PROMPTS, MeanOfChannel, TinyHost, small


def test_what_is_free_are_settings():
    assert settings().keys() >= FREE


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 1e-2), ("clip_norm", 0.5), ("carry_pairs", False)])
def test_resume_does_not_change_what_is_learnt(tmp_path, name, value):
    config = small(tmp_path)
    train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(should_stop=lambda: True))
    with pytest.raises(SpoError, match=f"begun with {name} = "):
        changed = small(tmp_path, **{name: value})
        train(TinyHost(changed), changed, PROMPTS, MeanOfChannel(), resume=True)


def test_resume_wants_the_same_preference_model_by_its_content(tmp_path):
    for name, content in {"a.safetensors": b"one", "b.safetensors": b"one", "c.safetensors": b"another"}.items():
        (tmp_path / name).write_bytes(content)
    config = small(tmp_path, preference=str(tmp_path / "a.safetensors"))
    train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(should_stop=lambda: True))

    def resumed(name, **changes):
        changed = small(tmp_path, preference=str(tmp_path / name), steps=1, **changes)
        return train(TinyHost(changed), changed, PROMPTS, MeanOfChannel(), resume=True)

    with pytest.raises(SpoError, match=r"a\.safetensors.*c\.safetensors.*allow_other_preference"):
        resumed("c.safetensors")
    assert resumed("b.safetensors").finished
    assert resumed("c.safetensors", allow_other_preference=True).finished


def test_resume_wants_the_same_settings_and_prompts(tmp_path):
    config = small(tmp_path)
    train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(should_stop=lambda: True))
    with pytest.raises(SpoError, match="beta = 10.0, not 20.0"):
        train(TinyHost(config), small(tmp_path, beta=20), PROMPTS, MeanOfChannel(), resume=True)
    with pytest.raises(SpoError, match="prompts are not those"):
        train(TinyHost(config), config, ["another"], MeanOfChannel(), resume=True)
    with pytest.raises(SpoError, match="no run to resume"):
        train(TinyHost(config), small(tmp_path / "nowhere"), PROMPTS, MeanOfChannel(), resume=True)


def test_resume_wants_the_same_checkpoint_and_the_run_keeps_its_prompts(tmp_path):
    config = small(tmp_path)
    train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(should_stop=lambda: True))
    assert json.loads((tmp_path / "taste.spo" / "prompts.json").read_text()) == PROMPTS
    host = TinyHost(config)
    host.checkpoint_name, host.checkpoint_hash = "other.safetensors", "9876543210"
    with pytest.raises(SpoError, match=r"begun on tiny\.safetensors, not on other\.safetensors"):
        train(host, config, PROMPTS, MeanOfChannel(), resume=True)
