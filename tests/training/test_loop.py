"""The training loop on a small real network: it learns, it leaves no trace, it stops and goes on exactly."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import pytest
import torch

from spo.config import build_config
from spo.errors import SpoError
from spo.lora.adapter import Adapter, modules_of_kinds
from spo.lora.read import read_lora
from spo.progress import Watcher
from spo.runs.layout import RunFiles
from spo.training.loop import batch_of, learning_rate, loss_of_pairs, rollout_settings, train
from tests.conftest import float16
from tests.tiny_host import MeanOfChannel, TinyHost, same_weights

PROMPTS = ["a fox", "a boat", "a pear"]


def small(folder, **changes):
    values = {
        "checkpoint": "tiny.safetensors",
        "prompts": "prompts.txt",
        "output": str(folder / "taste.safetensors"),
        "width": 64,
        "height": 64,
        "sampling_steps": 4,
        "divert_start_step": 1,
        "candidates": 2,
        "prompts_per_batch": 2,
        "pairs_per_update": 2,
        "learning_rate": 1e-3,
        "steps": 5,
        "save_every": 2,
        "seed": 5,
    }
    return build_config({**values, **changes})


def network_of(host):
    return {name: value.clone() for name, value in host.network.state_dict().items()}


def rows_of(config):
    with (RunFiles.of(config.run.output).metrics).open(newline="") as file:
        return list(csv.DictReader(file))


def weights_of(path):
    return read_lora(path).layers


def test_trains_every_weight_and_leaves_the_network_as_found(tmp_path):
    config = small(tmp_path)
    host = TinyHost(config)
    before, modules = network_of(host), [(name, id(module)) for name, module in host.network.named_modules()]
    flags = [parameter.requires_grad for parameter in host.network.parameters()]
    report = train(host, config, PROMPTS, MeanOfChannel())

    assert report.finished
    assert report.steps == 5
    after = network_of(host)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [(name, id(module)) for name, module in host.network.named_modules()] == modules
    assert [parameter.requires_grad for parameter in host.network.parameters()] == flags
    assert not hasattr(host.network, "peft_config")

    layers = weights_of(report.output)
    assert len(layers) == len(modules_of_kinds(host.network, ["attention"])) > 0
    assert all(float(layer.up.abs().max()) > 0 for layer in layers.values())
    settings = json.loads((tmp_path / "taste.spo.json").read_text())
    assert settings == config.flat()


def test_updates_lower_the_loss_of_their_pairs(tmp_path):
    """The whole chain of signs: which side wins, ratios, gradient, optimizer."""
    config = small(tmp_path)
    host = TinyHost(config)
    host.prepare(PROMPTS)
    told, seeds = batch_of(0, PROMPTS, config)
    pairs = host.rollout(told, seeds, rollout_settings(config), MeanOfChannel(), None).pairs
    adapter = Adapter(host.network, modules_of_kinds(host.network, ["attention"]), rank=8, alpha=8)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(12):
        result = loss_of_pairs(host, adapter, pairs, told, config)
        optimizer.zero_grad()
        result.loss.mean().backward()
        optimizer.step()
    assert float(result.loss.mean()) < 0.68
    assert float(result.ratio_win.mean()) > 1 > float(result.ratio_lose.mean())


@pytest.mark.parametrize(
    ("updates_before_stop", "changes"),
    [
        (1, {}),
        (3, {"inner_steps": 1, "accumulation": 2}),
        (4, {"schedule": "cosine", "warmup_steps": 2}),
    ],
)
def test_a_stopped_run_ends_like_an_uninterrupted_one(tmp_path, updates_before_stop, changes):
    whole = small(tmp_path / "whole", **changes)
    train(TinyHost(whole), whole, PROMPTS, MeanOfChannel())
    parts = small(tmp_path / "parts", **changes)
    seen = []
    watcher = Watcher(
        progress=lambda progress: seen.append(progress.step), should_stop=lambda: seen[-1:] == [updates_before_stop]
    )
    report = train(TinyHost(parts), parts, PROMPTS, MeanOfChannel(), watcher)
    assert not report.finished
    assert report.steps == updates_before_stop
    report = train(TinyHost(parts), parts, PROMPTS, MeanOfChannel(), resume=True)
    assert report.finished
    assert same_weights(weights_of(parts.run.output), weights_of(whole.run.output))
    timing = {"seconds", "images_per_s", "pairs_per_s"}
    for one, other in zip(rows_of(whole), rows_of(parts), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def test_a_stop_inside_a_rollout_does_the_rollout_again(tmp_path):
    whole = small(tmp_path / "whole")
    train(TinyHost(whole), whole, PROMPTS, MeanOfChannel())
    parts = small(tmp_path / "parts")
    verdicts = []
    watcher = Watcher(verdict=verdicts.append, should_stop=lambda: len(verdicts) >= 7)
    assert not train(TinyHost(parts), parts, PROMPTS, MeanOfChannel(), watcher).finished
    train(TinyHost(parts), parts, PROMPTS, MeanOfChannel(), resume=True)
    assert same_weights(weights_of(parts.run.output), weights_of(whole.run.output))


def test_shared_starts_cost_one_evaluation_and_change_nothing(tmp_path):
    config = small(tmp_path, guidance_scale=1)
    host = TinyHost(config)
    host.prepare(PROMPTS)
    preference = MeanOfChannel()
    told, seeds = batch_of(0, PROMPTS, config)
    pairs = host.rollout(told, seeds, rollout_settings(config), preference, None).pairs
    assert bool(pairs.shared.all())
    modules = modules_of_kinds(host.network, ["attention"])
    adapter = Adapter(host.network, modules, rank=4, alpha=4, seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters()[1::2]:
            parameter.normal_(std=0.02)

    def loss_and_gradient(of):
        host.evaluations = 0
        loss = loss_of_pairs(host, adapter, of, told, config).loss.mean()
        return loss, torch.autograd.grad(loss, adapter.parameters()), host.evaluations

    loss, gradient, evaluations = loss_and_gradient(pairs)
    apart = dataclasses.replace(pairs, shared=torch.zeros_like(pairs.shared))
    loss_apart, gradient_apart, evaluations_apart = loss_and_gradient(apart)
    assert evaluations == 2 * len(pairs)
    assert evaluations_apart == 2 * evaluations
    torch.testing.assert_close(loss, loss_apart, rtol=1e-5, atol=1e-7)
    scale = max(float(value.abs().max()) for value in gradient)
    for one, other in zip(gradient, gradient_apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_the_loss_of_a_fresh_adapter_is_ln_2(tmp_path):
    config = small(tmp_path, steps=1)
    train(TinyHost(config), config, PROMPTS, MeanOfChannel())
    assert float(rows_of(config)[0]["loss"]) == pytest.approx(math.log(2), abs=1e-6)


def test_small_calls_give_the_same_update(tmp_path):
    runs = {}
    for name, changes in {"at once": {}, "one by one": {"pairs_per_call": 1}}.items():
        config = small(tmp_path / name, steps=1, pairs_per_update=4, learning_rate=1e-3, epsilon=1e-3, **changes)
        train(TinyHost(config), config, PROMPTS, MeanOfChannel())
        runs[name] = weights_of(config.run.output)
    for name, layer in runs["at once"].items():
        torch.testing.assert_close(layer.up, runs["one by one"][name].up, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [float16, torch.bfloat16])
def test_half_precision_networks_train_with_float32_adapters(tmp_path, dtype):
    config = small(tmp_path, steps=3, save_precision="float32")
    host = TinyHost(config, dtype)
    report = train(host, config, PROMPTS, MeanOfChannel())
    assert report.finished
    layers = weights_of(report.output)
    assert all(layer.down.dtype == torch.float32 and float(layer.up.abs().max()) > 0 for layer in layers.values())


def test_saves_stages_and_keeps_the_last(tmp_path):
    config = small(tmp_path, steps=7, save_every=1, keep_last=2, sample_every=3)
    train(TinyHost(config), config, PROMPTS, MeanOfChannel())
    assert [path.name for path in RunFiles.of(tmp_path / "taste.safetensors").stages()] == [
        "taste-step000005.safetensors",
        "taste-step000006.safetensors",
    ]
    samples = sorted(path.name for path in (tmp_path / "taste.spo" / "samples").iterdir())
    assert samples == ["step000000.png", "step000003.png", "step000006.png"]


def test_no_run_and_no_file_is_replaced_silently(tmp_path):
    config = small(tmp_path, steps=1)
    train(TinyHost(config), config, PROMPTS, MeanOfChannel())
    before = (tmp_path / "taste.safetensors").read_bytes()
    with pytest.raises(SpoError, match="exists already"):
        train(TinyHost(config), config, PROMPTS, MeanOfChannel())
    assert (tmp_path / "taste.safetensors").read_bytes() == before
    again = small(tmp_path, steps=1, seed=6, replace=True)
    train(TinyHost(again), again, PROMPTS, MeanOfChannel())
    assert (tmp_path / "taste.safetensors").read_bytes() != before


def test_resume_wants_the_same_settings_and_prompts(tmp_path):
    config = small(tmp_path)
    train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(should_stop=lambda: True))
    with pytest.raises(SpoError, match="beta = 10.0, not 20.0"):
        train(TinyHost(config), small(tmp_path, beta=20), PROMPTS, MeanOfChannel(), resume=True)
    with pytest.raises(SpoError, match="prompts are not those"):
        train(TinyHost(config), config, ["another"], MeanOfChannel(), resume=True)
    with pytest.raises(SpoError, match="no run to resume"):
        train(TinyHost(config), small(tmp_path / "nowhere"), PROMPTS, MeanOfChannel(), resume=True)


def test_nan_from_the_network_stops_the_run_with_the_state_saved(tmp_path):
    whole = small(tmp_path / "whole")
    train(TinyHost(whole), whole, PROMPTS, MeanOfChannel())
    config = small(tmp_path / "broken")
    host = TinyHost(config)
    healthy = host.predict

    def breaks(x_vp, timesteps, conditioning):
        output = healthy(x_vp, timesteps, conditioning)
        return output * float("nan") if host.evaluations > 60 else output

    host.denoiser = dataclasses.replace(host.denoiser, predict=breaks)
    with pytest.raises(SpoError, match="not finite"):
        train(host, config, PROMPTS, MeanOfChannel())
    assert not hasattr(host.network, "peft_config")
    report = train(TinyHost(config), config, PROMPTS, MeanOfChannel(), resume=True)
    assert report.finished
    assert same_weights(weights_of(config.run.output), weights_of(whole.run.output))


def test_a_score_that_is_not_finite_is_named(tmp_path):
    config = small(tmp_path)
    with pytest.raises(SpoError, match=r'"mean-of-channel" gave a score that is not finite'):
        train(TinyHost(config), config, PROMPTS, MeanOfChannel(then=lambda scores: scores * float("inf")))


def test_goes_on_from_a_lora_file_and_compares_with_it(tmp_path):
    first = small(tmp_path / "first", rank=2, save_precision="float32")
    train(TinyHost(first), first, PROMPTS, MeanOfChannel())
    second = small(tmp_path / "second", rank=8, start_from=first.run.output, steps=1, save_precision="float32")
    train(TinyHost(second), second, PROMPTS, MeanOfChannel())
    assert float(rows_of(second)[0]["loss"]) == pytest.approx(math.log(2), abs=1e-6)  # the reference is the start
    before, after = weights_of(first.run.output), weights_of(second.run.output)
    assert before.keys() == after.keys()
    moved = [float((after[name].up - before[name].up).abs().max()) for name in before]
    assert all(0 < distance < 5e-3 for distance in moved)
    assert {layer.rank for layer in after.values()} == {2}

    base = small(tmp_path / "base", start_from=first.run.output, reference="base", steps=1)
    train(TinyHost(base), base, PROMPTS, MeanOfChannel())
    assert float(rows_of(base)[0]["loss"]) != pytest.approx(math.log(2), abs=1e-6)


def test_each_epoch_goes_over_all_prompts_in_its_own_order():
    config = build_config({"prompts_per_batch": 4, "seed": 3})
    prompts = [f"prompt {i}" for i in range(10)]
    epochs = [[batch_of(3 * epoch + i, prompts, config) for i in range(3)] for epoch in range(2)]
    orders = [[prompt for told, _ in epoch for prompt in told] for epoch in epochs]
    assert [sorted(order) for order in orders] == [sorted(prompts)] * 2
    assert orders[0] != orders[1]
    seeds = [seed for epoch in epochs for _, drawn in epoch for seed in drawn]
    assert len(set(seeds)) == 20


def test_learning_rate_schedules():
    def at(step, fraction, **changes):
        return learning_rate(build_config({"learning_rate": 1.0, **changes}), step, fraction)

    assert at(500, 0.5) == 1
    assert [at(step, 0.0, warmup_steps=4) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert at(9, 0.25, schedule="linear") == 0.75
    assert at(9, 0.5, schedule="cosine") == pytest.approx(0.5)
    assert at(9, 1.0, schedule="cosine") == pytest.approx(0)


class Cramped(TinyHost):
    """Has memory for `room` latents in one evaluation of the network, and none more."""

    def __init__(self, config, room):
        super().__init__(config)
        healthy = self.predict
        self.largest = 0

        def predict(x_vp, timesteps, conditioning):
            self.largest = max(self.largest, len(x_vp))
            if len(x_vp) > room:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return healthy(x_vp, timesteps, conditioning)

        self.denoiser = dataclasses.replace(self.denoiser, predict=predict)


def test_out_of_memory_halves_and_goes_on_to_the_same_lora(tmp_path):
    changes = {
        "candidates": 4,
        "pairs_per_update": 8,
        "steps": 3,
        "prompts_per_batch": 1,
        "sampling_steps": 8,
        "guidance_scale": 1,
        "threshold": 0.0,
        "save_precision": "float32",
    }
    roomy, cramped = small(tmp_path / "roomy", **changes), small(tmp_path / "cramped", **changes)
    train(TinyHost(roomy), roomy, PROMPTS, MeanOfChannel())
    said = []
    host = Cramped(cramped, room=1)
    report = train(host, cramped, PROMPTS, MeanOfChannel(), Watcher(log=said.append))
    assert report.finished
    assert host.largest > 1
    assert any("candidates_per_call 1" in line for line in said)
    assert any("pairs_per_call 1" in line for line in said)
    expected, found = weights_of(roomy.run.output), weights_of(cramped.run.output)
    for name in expected:
        torch.testing.assert_close(found[name].up, expected[name].up, rtol=1e-3, atol=1e-5)


def test_out_of_memory_with_nothing_left_to_halve_says_what_to_lower(tmp_path):
    config = small(tmp_path)
    host = Cramped(config, room=0)
    with pytest.raises(SpoError, match=r"Out of memory.*prompts_per_batch"):
        train(host, config, PROMPTS, MeanOfChannel())
    assert not hasattr(host.network, "peft_config")


def test_gradient_checkpointing_is_the_last_resort(tmp_path):
    config = small(tmp_path, pairs_per_update=1, guidance_scale=1, steps=2)
    host = TinyHost(config)
    healthy = host.predict

    def predict(x_vp, timesteps, conditioning):
        if torch.is_grad_enabled() and not host.checkpointing:
            raise RuntimeError("CUDA out of memory")
        return healthy(x_vp, timesteps, conditioning)

    host.denoiser = dataclasses.replace(host.denoiser, predict=predict)
    said = []
    assert train(host, config, PROMPTS, MeanOfChannel(), Watcher(log=said.append)).finished
    assert said == ["Out of memory: going on with gradient_checkpointing on."]


def test_any_error_in_a_rollout_keeps_the_updates_before_it(tmp_path):
    config, pools = small(tmp_path), []

    def fails(scores):
        pools.append(scores)
        if len(pools) > 8:
            raise KeyError("a fault in the preference model")
        return scores

    with pytest.raises(KeyError):
        train(TinyHost(config), config, PROMPTS, MeanOfChannel(then=fails))
    assert train(TinyHost(config), config, PROMPTS, MeanOfChannel(), resume=True).finished
    whole = small(tmp_path / "whole")
    train(TinyHost(whole), whole, PROMPTS, MeanOfChannel())
    assert same_weights(weights_of(config.run.output), weights_of(whole.run.output))


def test_resume_wants_the_same_checkpoint_and_the_run_keeps_its_prompts(tmp_path):
    config = small(tmp_path)
    train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(should_stop=lambda: True))
    assert json.loads((tmp_path / "taste.spo" / "prompts.json").read_text()) == PROMPTS
    host = TinyHost(config)
    host.checkpoint_name, host.checkpoint_hash = "other.safetensors", "9876543210"
    with pytest.raises(SpoError, match=r"begun on tiny\.safetensors, not on other\.safetensors"):
        train(host, config, PROMPTS, MeanOfChannel(), resume=True)


def test_every_written_file_is_told(tmp_path):
    config, told = small(tmp_path, steps=3, save_every=2), []
    train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(saved=lambda path: told.append(path.name)))
    assert told == ["taste-step000002.safetensors", "taste.safetensors"]
