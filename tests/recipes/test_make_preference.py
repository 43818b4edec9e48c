"""The recipe of the preference model: groups that share their first steps, labelled by the rule asked for."""

from __future__ import annotations

import pytest
import torch

from recipes.demo_checkpoint.make_preference import GROUP, across, pairwise, sample_groups
from spo.demo.rule import RULES
from spo.demo.run import demo_config
from spo.headless.host import load_host


@pytest.mark.slow
def test_a_group_is_labelled_by_the_rule(tmp_path):
    host = load_host(demo_config(tmp_path, {"sampling_steps": 4}))
    host.prepare(["red apple"])
    groups = {rule: sample_groups(host, ["red apple"], 1, seed=1, rule=rule) for rule in RULES}
    first, second = groups.values()
    assert torch.equal(first.clean, second.clean) and first.clean.shape == (1, GROUP, 4, 8, 8)
    for rule, group in groups.items():
        torch.testing.assert_close(group.taste[0], RULES[rule](host.decode(group.clean[0])))


def test_pairs_within_a_group_and_across_groups():
    taste = torch.tensor([[3.0, 1.0, 2.0, 0.0], [9.0, 8.0, 7.0, 6.0]])
    difference, label = pairwise(taste, taste)
    assert difference.shape == (2 * GROUP * (GROUP - 1) // 2,)
    assert torch.equal(label, (difference > 0).float())
    difference, label = across(taste, taste, 1)
    assert torch.equal(label, torch.tensor([0.0] * 4 + [1.0] * 4)) and torch.equal(label, (difference > 0).float())
