"""The recipe of the preference model: groups that share their first steps, labelled by the rule asked for."""

from __future__ import annotations

import pytest
import torch

from recipes.demo_checkpoint.make_preference import (
    GROUP,
    SEEN,
    Groups,
    accuracy,
    across,
    clean_predictions,
    fit,
    labelled,
    pairwise,
    sample_groups,
    seen_latents,
)
from spo.demo.rule import RULES
from spo.demo.run import demo_config
from spo.headless.host import load_host


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    host = load_host(demo_config(tmp_path_factory.mktemp("demo"), {"sampling_steps": 4}))
    host.prepare(["red apple", "pizza"])
    return host


@pytest.mark.slow
def test_a_group_is_labelled_by_the_rule(host):
    latents = sample_groups(host, ["red apple", "pizza"], 3, seed=1)
    assert latents.shape == (3, GROUP, 4, 8, 8)
    for rule in RULES:
        groups = labelled(host, latents, ["red apple", "pizza"], rule)
        assert torch.equal(groups.clean, latents) and groups.prompts == ["red apple", "pizza", "red apple"]
        torch.testing.assert_close(groups.taste[1], RULES[rule](host.decode(latents[1])))


@pytest.mark.slow
def test_what_each_kind_of_scorer_sees(host):
    """Of finished pictures it knows no time; clean predictions come of the noise that a group shares; noisy latents
    have variance 1 in the end and each its own noise."""
    groups = Groups(torch.randn(2, GROUP, 4, 8, 8), torch.zeros(2, GROUP), ["red apple", "pizza"])
    timestep = torch.tensor([251, 999])
    seen = {kind: seen_latents(host, groups, timestep, ("test",), kind) for kind in SEEN}
    assert all(latents.shape == groups.clean.shape for latents, _ in seen.values())
    assert torch.equal(seen["finished"][0], groups.clean) and seen["finished"][1].tolist() == [0, 0]
    assert all(torch.equal(seen[kind][1], timestep) for kind in ("predicted", "noisy"))
    torch.testing.assert_close(seen["predicted"][0], clean_predictions(host, groups, timestep, ("test",)))
    noisy, kept = seen["noisy"][0], host.alphas_cumprod[timestep].float().view(2, 1, 1, 1, 1)
    noise = (noisy - kept.sqrt() * groups.clean) / (1 - kept).sqrt()
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    assert not torch.allclose(noise[:, 0], noise[:, 1], atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seen", SEEN)
def test_a_scorer_of_each_kind_learns(host, seen):
    """Of latents whose first channel is the taste: 48 updates are enough to order them."""
    torch.manual_seed(0)
    clean = torch.randn(8, GROUP, 4, 8, 8)
    groups = Groups(clean + 3 * torch.randn(8, GROUP, 1, 1, 1), torch.zeros(8, GROUP), ["red apple", "pizza"] * 4)
    groups.taste.copy_(groups.clean.mean((2, 3, 4)))
    network = fit(host, groups, 24, 2, 1, seen)
    assert accuracy(network, host, groups, 0, seen) > 0.9


def test_pairs_within_a_group_and_across_groups():
    taste = torch.tensor([[3.0, 1.0, 2.0, 0.0], [9.0, 8.0, 7.0, 6.0]])
    difference, label = pairwise(taste, taste)
    assert difference.shape == (2 * GROUP * (GROUP - 1) // 2,)
    assert torch.equal(label, (difference > 0).float())
    difference, label = across(taste, taste, 1)
    assert torch.equal(label, torch.tensor([0.0] * 4 + [1.0] * 4)) and torch.equal(label, (difference > 0).float())
