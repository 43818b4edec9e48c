"""The training loop on a small real network: it learns, it leaves no trace, it stops and goes on exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch

from spo.algorithm.objective import pair_loss, spo_loss
from spo.errors import SpoError
from spo.lora.adapter import Adapter, modules_of_kinds
from spo.progress import Watcher
from spo.runs.layout import RunFiles
from spo.training.gradient import configured_loss, pair_denoisers
from spo.training.host import rollout_settings
from spo.training.loop import train
from spo.training.schedule import batch_of
from tests.conftest import float16
from tests.tiny_host import PROMPTS, MeanOfChannel, TinyHost, rows_of, same_weights, small, weights_of


def network_of(host):
    return {name: value.clone() for name, value in host.network.state_dict().items()}


def loss_of_pairs(host, adapter, pairs, prompts, config):
    return pair_loss(*pair_denoisers(host, adapter, prompts), pairs, configured_loss(config), config.rollout.eta)


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


def test_a_run_that_makes_way_between_rollouts_ends_in_the_same_lora(tmp_path):
    """It returns after each rollout and its updates, with the network as found and no stage written."""
    whole, parts = small(tmp_path / "whole", save_every=0), small(tmp_path / "parts", save_every=0)
    expected = train(TinyHost(whole), whole, PROMPTS, MeanOfChannel())
    host, preference = TinyHost(parts), MeanOfChannel()
    before, reports = network_of(host), []
    while not reports or reports[-1].made_way:
        report = train(
            host, parts, PROMPTS, preference, Watcher(make_way=lambda: True), resume=bool(reports),
        )  # fmt: skip
        reports.append(report)
        after = network_of(host)
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        assert report.finished or (report.made_way and report.output is None and not report.files.stages())
    batches = [row["batch"] for row in rows_of(whole)]
    assert report.finished and len(reports) == len(batches) > 1
    assert [row["batch"] for row in rows_of(parts)] == batches
    assert same_weights(weights_of(report.output), weights_of(expected.output))


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
    seen.clear()
    again = Watcher(progress=lambda progress: seen.append(progress.step))
    report = train(TinyHost(parts), parts, PROMPTS, MeanOfChannel(), again, resume=True)
    assert report.finished
    assert seen[0] == updates_before_stop
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


def test_every_written_file_is_told(tmp_path):
    config, told = small(tmp_path, steps=3, save_every=2), []
    train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(saved=lambda path: told.append(path.name)))
    assert told == ["taste-step000002.safetensors", "taste.safetensors"]


# ---- what ends a run


def test_replacing_a_run_removes_its_stages_and_those_of_nobody_else(tmp_path):
    former = small(tmp_path, steps=5, save_every=1, keep_last=3, sample_every=2)
    train(TinyHost(former), former, PROMPTS, MeanOfChannel())
    files = RunFiles.of(former.run.output)
    assert [path.name for path in files.stages()] == [f"taste-step00000{step}.safetensors" for step in (2, 3, 4)]
    foreign = files.stage(9)
    foreign.write_bytes(b"not of SPO")
    again = small(tmp_path, steps=2, save_every=1, keep_last=3, replace=True)
    saved = []
    train(TinyHost(again), again, PROMPTS, MeanOfChannel(), Watcher(saved=lambda path: saved.append(path.exists())))
    assert saved == [True, True]
    assert files.stages() == [files.stage(1), foreign]
    assert files.all_samples() == []


def test_a_run_without_pairs_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("spo.training.loop.FRUITLESS_ROLLOUTS", 3)
    config = small(tmp_path, threshold=1.0, steps=5)
    host = TinyHost(config)
    with pytest.raises(SpoError, match=r"No pair was kept in the last 3 rollouts.*threshold 1; lower it"):
        train(host, config, PROMPTS, MeanOfChannel())
    assert not hasattr(host.network, "peft_config")
    assert [row["pairs"] for row in rows_of(config)] == ["0", "0", "0"]
    with pytest.raises(SpoError, match="No pair was kept in the last 4 rollouts"):
        train(TinyHost(config), config, PROMPTS, MeanOfChannel(), resume=True)


# ---- pairs that wait


def test_pairs_too_few_for_an_update_wait_for_the_next_rollout(tmp_path):
    config = small(tmp_path, pairs_per_update=4, threshold=0.0, prompts_per_batch=1, epochs=1, steps=0)
    whole = train(TinyHost(config), config, PROMPTS, MeanOfChannel())
    pairs = [int(row["pairs"]) for row in rows_of(config)]
    assert whole.steps == 3  # 3 prompts of 3 pairs: 4 + 4 + the rest
    assert pairs == [0, 4, 5]
    alone = small(tmp_path / "alone", pairs_per_update=4, threshold=0.0, prompts_per_batch=1, epochs=1, steps=0,
                  carry_pairs=False)  # fmt: skip
    train(TinyHost(alone), alone, PROMPTS, MeanOfChannel())
    assert [int(row["pairs"]) for row in rows_of(alone)] == [3, 3, 3]


@pytest.mark.parametrize("updates_before_stop", [1, 2])
def test_a_stop_keeps_the_pairs_that_wait(tmp_path, updates_before_stop):
    changes = {"pairs_per_update": 4, "threshold": 0.0, "prompts_per_batch": 1, "steps": 3, "inner_steps": 1}
    whole, parts = small(tmp_path / "whole", **changes), small(tmp_path / "parts", **changes)
    train(TinyHost(whole), whole, PROMPTS, MeanOfChannel())
    seen = []
    watcher = Watcher(
        progress=lambda progress: seen.append(progress.step), should_stop=lambda: seen[-1:] == [updates_before_stop]
    )
    assert not train(TinyHost(parts), parts, PROMPTS, MeanOfChannel(), watcher).finished
    train(TinyHost(parts), parts, PROMPTS, MeanOfChannel(), resume=True)
    assert same_weights(weights_of(parts.run.output), weights_of(whole.run.output))


def test_portions_of_prompts_give_the_same_pairs_in_the_same_order(tmp_path):
    lora = {}
    for size in (0, 1, 2):
        config = small(
            tmp_path / str(size), prompts_per_batch=3, prompts_per_call=size, inner_steps=1, sampling_steps=6, steps=2,
            epsilon=1e-3, save_precision="float32",
        )  # fmt: skip
        train(TinyHost(config), config, PROMPTS, MeanOfChannel())
        lora[size] = weights_of(config.run.output)
    for size in (1, 2):
        for name, layer in lora[0].items():
            torch.testing.assert_close(lora[size][name].up, layer.up, rtol=1e-2, atol=1e-6)


# ---- overflow, and files that are held


class Overflowing:
    """A loss scaler whose first `times` scales overflow; for a network that computes in float32."""

    def __init__(self, times):
        self.times, self.updates = times, 0

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        if self.times > 0:
            self.times -= 1
            optimizer.param_groups[0]["params"][1].grad.fill_(float("inf"))

    def is_enabled(self):
        return True

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        self.updates += 1

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_an_overflow_is_no_update_and_loses_no_pair(tmp_path, monkeypatch):
    plain = small(tmp_path / "plain", steps=2)
    train(TinyHost(plain), plain, PROMPTS, MeanOfChannel())
    config, scaler = small(tmp_path / "overflows", steps=2), Overflowing(19)
    monkeypatch.setattr("spo.training.loop.make_scaler", lambda device, dtype: scaler)
    assert train(TinyHost(config), config, PROMPTS, MeanOfChannel()).steps == 2
    assert scaler.updates == 19 + 2
    assert same_weights(weights_of(config.run.output), weights_of(plain.run.output))


def test_twenty_overflows_in_a_row_are_an_error(tmp_path, monkeypatch):
    config = small(tmp_path)
    monkeypatch.setattr("spo.training.loop.make_scaler", lambda device, dtype: Overflowing(20))
    with pytest.raises(SpoError, match=r"gradient is not finite at update 0.*bfloat16"):
        train(TinyHost(config), config, PROMPTS, MeanOfChannel())


def test_files_that_are_held_do_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("spo.files.PATIENCE_S", (0.0, 0.0))
    config, said = small(tmp_path, steps=4, save_every=1), []
    files = RunFiles.of(config.run.output)
    replace, held = os.replace, {files.state: 4, files.metrics: 20, files.stage(2): 3}

    def refuse(source, target):
        if held.get(Path(target), 0) and files.stage(1).exists():
            held[Path(target)] -= 1
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    report = train(TinyHost(config), config, PROMPTS, MeanOfChannel(), Watcher(log=said.append))
    assert report.finished and report.output.exists()
    assert any("state.spo" in line and "going on without" in line for line in said)
    assert not any("step000002" in line for line in said) or not files.stage(2).exists()
    again = small(tmp_path, steps=5)
    assert train(TinyHost(again), again, PROMPTS, MeanOfChannel(), resume=True).finished


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = small(tmp_path)
    with pytest.raises(SpoError, match="loss is not finite at update 0"):
        train(TinyHost(config), config, PROMPTS, MeanOfChannel(), loss=lambda win, lose: nan_loss(win, lose))


def nan_loss(win, lose):
    result = spo_loss(win, lose, 10.0, 0.1)
    return dataclasses.replace(result, loss=result.loss * float("nan"))


def test_a_gradient_that_is_not_finite_ends_the_run_with_the_state_before_it(tmp_path):
    whole = small(tmp_path / "whole", steps=3)
    train(TinyHost(whole), whole, PROMPTS, MeanOfChannel())
    config, calls = small(tmp_path / "broken", steps=3), []

    def breaks(win, lose):
        calls.append(1)
        result = spo_loss(win, lose, 10.0, 0.1)
        broken = result.loss + (win - win.detach()).abs().sqrt()  # its value is right, its derivative is not finite
        return dataclasses.replace(result, loss=broken) if len(calls) == 3 else result

    with pytest.raises(SpoError, match=r"gradient is not finite at update 2; the last good state is saved"):
        train(TinyHost(config), config, PROMPTS, MeanOfChannel(), loss=breaks)
    assert train(TinyHost(config), config, PROMPTS, MeanOfChannel(), resume=True).finished
    assert same_weights(weights_of(config.run.output), weights_of(whole.run.output))
