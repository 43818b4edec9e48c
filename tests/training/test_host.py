"""What every host makes of the configuration."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.diffusion import scaled_linear_alphas_cumprod, sigma_ladder
from spo.algorithm.rollout import RolloutSettings
from spo.config import build_config
from spo.errors import SpoError
from spo.training.host import ladder_of, rollout_settings

ALPHAS = scaled_linear_alphas_cumprod()


def test_the_rollouts_settings_are_the_configured_ones():
    assert rollout_settings(build_config({})) == RolloutSettings()
    changed = rollout_settings(
        build_config({"candidates": 3, "timestep_min": 20, "eta": 0.5, "threshold": 0.1}, "sdxl")
    )
    assert changed == RolloutSettings(candidates=3, inner_steps=3, timestep_min=20, eta=0.5, threshold=0.1)


def test_a_ladder_by_name_or_by_numbers():
    named = ladder_of(build_config({"sigmas": "karras", "sampling_steps": 7}), ALPHAS)
    assert torch.equal(named, sigma_ladder("karras", 7, ALPHAS))
    assert ladder_of(build_config({"sigmas": "4, 2.5, 1, 0"}), ALPHAS).tolist() == [4, 2.5, 1, 0]


@pytest.mark.parametrize("text", ["4, 2.5, x1", "1, 2, 3", "5", "carras"])
def test_what_is_no_ladder_is_refused(text):
    with pytest.raises(SpoError):
        ladder_of(build_config({"sigmas": text}), ALPHAS)
