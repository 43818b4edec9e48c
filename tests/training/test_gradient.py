"""The gradient of one update: both sides of a pair in one graph, or one after the other."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.objective import backward_by_sides, pair_loss
from spo.errors import SpoError
from spo.headless.compare import adapter_from_file
from spo.lora.adapter import Adapter, modules_of_kinds
from spo.preference.steer import Steering
from spo.preference.taste.fit import fit_taste
from spo.progress import Watcher
from spo.training.gradient import configured_loss, configured_refinements, pair_denoisers
from spo.training.host import rollout_settings
from spo.training.loop import train
from spo.training.schedule import batch_of
from tests.tiny_host import PROMPTS, MeanOfChannel, TinyHost, rows_of, same_weights, small, weights_of
from tests.vote_worlds import QUICK, vote_set, vote_set_by_prompt

REFINED = {"step_weight": "gradspo", "winner_preserving": 0.99}


@pytest.mark.parametrize(("ratio_clamp", "changes"), [(0.1, {}), (1e-4, {}), (0.1, REFINED)])
def test_side_by_side_gives_the_gradient_of_the_joint_graph(tmp_path, ratio_clamp, changes):
    config = small(tmp_path, inner_steps=2, sampling_steps=5, ratio_clamp=ratio_clamp, **changes)
    host = TinyHost(config)
    host.prepare(PROMPTS)
    prompts, seeds = batch_of(0, PROMPTS, config)
    pairs = host.rollout(prompts, seeds, rollout_settings(config), MeanOfChannel(), None).pairs
    assert bool(pairs.shared.any()) and not bool(pairs.shared.all())
    adapter = Adapter(host.network, modules_of_kinds(host.network, ["attention"]), rank=4, alpha=4, seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters()[1::2]:
            parameter.normal_(std=0.02)
    policy, reference = pair_denoisers(host, adapter, prompts)
    loss = configured_loss(config)
    refinements = configured_refinements(config)

    def gradient():
        values = [parameter.grad for parameter in adapter.parameters()]
        for parameter in adapter.parameters():
            parameter.grad = None
        return torch.cat([value.flatten() for value in values])

    joint = pair_loss(policy, reference, pairs, loss, config.rollout.eta, refinements)
    (3 * joint.loss.mean()).backward()
    expected = gradient()
    apart = backward_by_sides(
        policy, reference, pairs, loss, lambda losses: (3 * losses.mean()).backward(), config.rollout.eta, refinements
    )
    found = gradient()
    assert float(expected.abs().max()) > 0
    assert float((found - expected).abs().max()) < 1e-6 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(apart.loss, joint.loss.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(apart.ratio_win, joint.ratio_win, rtol=1e-6, atol=1e-7)
    assert torch.equal(apart.clamped, joint.clamped)
    assert bool(joint.clamped.any()) == (ratio_clamp < 0.1)


# ---- method steer


@pytest.fixture(scope="module")
def head():
    return fit_taste(vote_set(60), QUICK, name="mine").head


def steered(folder, **changes):
    return small(folder, **{"method": "steer", "steps": 6, "save_every": 0, **changes})


def test_method_steer_learns_what_the_slider_does(head, tmp_path):
    config = steered(tmp_path, steps=40, learning_rate=1e-2)
    report = train(TinyHost(config), config, PROMPTS, head)
    losses = [float(row["loss"]) for row in rows_of(config)]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    # on latents that training never saw the network is nearer to the slider's prediction than it was
    host = TinyHost(config)
    host.prepare(PROMPTS)
    x, sigma, step = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3), torch.ones(3)
    with torch.no_grad():
        before = host.denoise(x, sigma, PROMPTS, step)
    target = before + Steering(head, 1.0).shift(x, sigma)
    adapter_from_file(host, report.output)
    with torch.no_grad():
        after = host.denoise(x, sigma, PROMPTS, step)
    assert float((after - target).square().mean()) < 0.9 * float((before - target).square().mean())


def test_every_latent_of_a_pool_teaches_whatever_its_verdict(head, tmp_path):
    config = steered(tmp_path, threshold=0.9, inner_steps=2)
    assert (config.rollout.threshold, config.rollout.inner_steps) == (0.0, 0)
    host = TinyHost(config)
    host.prepare(PROMPTS)
    prompts, seeds = batch_of(0, PROMPTS, config)
    pairs = host.rollout(prompts, seeds, rollout_settings(config), head, None).pairs
    assert len(pairs) == len(prompts) * (config.rollout.sampling_steps - config.rollout.divert_start_step)


def test_a_head_that_reads_prompts_is_given_them(tmp_path):
    reader = fit_taste(vote_set_by_prompt(120), QUICK, name="reads").head
    assert reader.prompt_reader is not None
    config = steered(tmp_path)
    host = TinyHost(config)
    host.text_features = lambda prompts: torch.randn(len(prompts), 6)
    assert train(host, config, PROMPTS, reader).finished


def test_without_a_taste_head_method_steer_is_refused(tmp_path):
    config = steered(tmp_path)
    with pytest.raises(SpoError, match='learns from a taste head, and "mean-of-channel" is none'):
        train(TinyHost(config), config, PROMPTS, MeanOfChannel())
    assert not list(tmp_path.iterdir())


def test_a_steered_run_that_was_stopped_ends_in_the_same_lora(head, tmp_path):
    whole = steered(tmp_path / "whole")
    expected = train(TinyHost(whole), whole, PROMPTS, head)
    parts, updates = steered(tmp_path / "parts"), []
    stopping = Watcher(progress=updates.append, should_stop=lambda: len(updates) > 4)
    stopped = train(TinyHost(parts), parts, PROMPTS, head, stopping)
    assert not stopped.finished
    again = train(TinyHost(parts), parts, PROMPTS, head, resume=True)
    assert same_weights(weights_of(expected.output), weights_of(again.output))
