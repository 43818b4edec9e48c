"""The demonstration: its checkpoint, its preference model, and that a short training moves the true taste."""

from __future__ import annotations

import io
import itertools
import json
from contextlib import nullcontext, redirect_stdout

import pytest
import torch

from spo.algorithm.preference import Candidates
from spo.algorithm.rollout import RolloutSettings
from spo.checkpoint.inspect import inspect_checkpoint
from spo.demo.judge import HERE, held_out
from spo.demo.rule import colourfulness
from spo.demo.run import CHECKPOINT, demo_config, run_demo
from spo.headless.host import load_host
from spo.preference.load import load_preference
from spo.progress import Watcher


def test_the_demo_fits_the_repository_and_is_a_checkpoint():
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 25e6
    info = inspect_checkpoint(CHECKPOINT)
    assert (info.architecture, info.prediction_type) == ("sd15", "epsilon")
    assert info.vae is not None
    assert len(info.text_encoders) == 1


def test_the_preference_model_knows_the_rule_on_pictures_it_never_saw(tmp_path):
    """Finished latents of held-out prompts: the order of pairs by score and by rule agree in most cases."""
    config = demo_config(tmp_path)
    host = load_host(config)
    preference = load_preference(config, host.device, host.architecture)
    prompts, seeds = (values[:32:2] for values in held_out())
    host.prepare(prompts)
    plain = RolloutSettings(candidates=1)
    variants = [host.rollout(prompts, [seed + 5000 * k for seed in seeds], plain, None, None).x for k in range(4)]
    pool = torch.stack(variants)
    scores = preference.score(Candidates(pool, 0.03, 0.0, pool, host.decode), prompts)
    taste = torch.stack([colourfulness(host.decode(latents)) for latents in variants])
    agree = [
        bool((scores[i] > scores[j])[b]) == bool((taste[i] > taste[j])[b])
        for i, j in itertools.combinations(range(4), 2)
        for b in range(len(prompts))
    ]
    assert sum(agree) / len(agree) > 0.75


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """The folder of a demonstration of 30 updates, of up to 135 by default, and what was printed."""
    folder, text = tmp_path_factory.mktemp("demo") / "run", io.StringIO()
    with redirect_stdout(text):
        assert run_demo(folder, lambda: nullcontext(Watcher()), steps=30) == 0
    return folder, text.getvalue()


@pytest.mark.slow
def test_short_training_raises_the_true_taste(demonstration):
    result = json.loads((demonstration[0] / "result.json").read_text())
    assert result["taste"]["LoRA"] > result["taste"]["base"]
    assert result["win_rate"] > 0.6


@pytest.mark.slow
def test_demo_command_leaves_everything_and_is_not_done_twice(demonstration, capsys):
    folder, text = demonstration
    names = {path.name for path in folder.iterdir()}
    assert names >= {"demo_lora.safetensors", "grid.png", "curves.png", "result.json"}
    assert "subject recognised" in text
    assert "held-out pairs" in text
    before = (folder / "demo_lora.safetensors").read_bytes()
    assert run_demo(folder, lambda: nullcontext(Watcher()), steps=30) == 0
    assert "already" in capsys.readouterr().out
    assert (folder / "demo_lora.safetensors").read_bytes() == before
