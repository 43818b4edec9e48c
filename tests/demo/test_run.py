"""The demonstration: its rule, its judge, its checkpoint, and that a short training moves the true taste."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from spo.algorithm.preference import Candidates
from spo.checkpoint.inspect import inspect_checkpoint
from spo.demo.judge import HERE, Judge, held_out, taste_win_rate
from spo.demo.rule import colourfulness
from spo.demo.run import CHECKPOINT, demo_config, run_demo
from spo.headless.compare import adapter_from_file, pictures
from spo.headless.host import load_host
from spo.preference.load import load_preference
from spo.progress import Watcher
from spo.prompts import read_prompts
from spo.training.loop import train


def test_the_rule_is_hasler_and_suesstrunks():
    grey = torch.zeros(1, 3, 4, 4)
    red = torch.full((1, 3, 4, 4), -1.0)
    red[:, 0] = 1
    half = torch.cat([red[..., :2], -torch.ones(1, 3, 4, 2)], dim=3)  # half red, half black
    values = colourfulness(torch.cat([grey, red, half]))
    # red: rg = 255, yb = 127.5 everywhere, no spread: 0.3 sqrt(255^2 + 127.5^2)
    assert float(values[0]) == 0
    assert float(values[1]) == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5, rel=1e-5)
    # half: spread sqrt(127.5^2 + 63.75^2), means halved
    spread = (127.5**2 + 63.75**2) ** 0.5
    assert float(values[2]) == pytest.approx(1.3 * spread, rel=1e-5)


def test_the_demo_fits_the_repository_and_is_a_checkpoint():
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 25e6
    info = inspect_checkpoint(CHECKPOINT)
    assert (info.architecture, info.prediction_type) == ("sd15", "epsilon")
    assert info.vae is not None
    assert len(info.text_encoders) == 1


def test_judge_and_training_share_no_prompt_and_no_seed():
    told, seeds = held_out()
    assert len(told) == len(seeds) == 64
    assert len(set(seeds)) == 64
    assert set(told).isdisjoint(read_prompts(HERE / "prompts.txt"))


def test_the_preference_model_knows_the_rule_on_pictures_it_never_saw(tmp_path):
    """Finished latents of held-out prompts: the order of pairs by score and by rule agree in most cases."""
    config = demo_config(tmp_path)
    host = load_host(config)
    preference = load_preference(config, host.device, host.architecture)
    told, seeds = (values[:8] for values in held_out())
    host.prepare(told)
    from spo.algorithm.rollout import RolloutSettings

    plain = RolloutSettings(candidates=1)
    variants = [host.rollout(told, [seed + 5000 * k for seed in seeds], plain, None, None).x for k in range(6)]
    pool = torch.stack(variants)
    scores = preference.score(Candidates(pool, 0.03, 0.0, pool, host.decode), told)
    taste = torch.stack([colourfulness(host.decode(latents)) for latents in variants])
    agree = [
        bool((scores[i] > scores[j])[b]) == bool((taste[i] > taste[j])[b])
        for i, j in itertools.combinations(range(6), 2)
        for b in range(8)
    ]
    assert sum(agree) / len(agree) > 0.75


def test_a_short_training_raises_the_true_taste(tmp_path):
    config = demo_config(tmp_path, {"steps": 50, "save_every": 0, "sample_every": 0})
    host = load_host(config)
    told, seeds = (values[:32] for values in held_out())
    host.prepare(told)
    judge = Judge()
    base = judge.judge(pictures(host, told, seeds, eta=config.rollout.eta), told)
    train(host, config, read_prompts(config.prompt.prompts), load_preference(config, host.device, host.architecture))
    host.prepare(told)
    adapter_from_file(host, Path(config.run.output))
    tuned = judge.judge(pictures(host, told, seeds, eta=config.rollout.eta), told)
    assert float(tuned.taste.mean()) > float(base.taste.mean())
    assert taste_win_rate(tuned, base).rate > 0.6


def test_demo_command_leaves_everything_and_is_not_done_twice(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run_demo(folder, lambda: nullcontext(Watcher()), steps=6) == 0
    names = {path.name for path in folder.iterdir()}
    assert names >= {"demo_lora.safetensors", "grid.png", "curves.png", "result.json"}
    said = capsys.readouterr().out
    assert "subject recognised" in said
    assert "held-out pairs" in said
    before = (folder / "demo_lora.safetensors").read_bytes()
    assert run_demo(folder, lambda: nullcontext(Watcher()), steps=6) == 0
    assert "already" in capsys.readouterr().out
    assert (folder / "demo_lora.safetensors").read_bytes() == before
