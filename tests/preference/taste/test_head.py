"""The taste head: fitting, refusing, scores, files, choosing pairs, and rollouts that need no prediction."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.preference import Candidates
from spo.algorithm.rollout import RolloutSettings
from spo.config import build_config
from spo.errors import SpoError
from spo.preference.load import describe_preference, load
from spo.preference.taste.head import TasteFacts, TasteHead, TasteNetwork, choose_pair, save_taste
from tests.tiny_host import MeanOfChannel, TinyHost


def candidates(x: torch.Tensor, sigma: float = 0.5) -> Candidates:
    def no_decoder(latents):
        raise AssertionError("the taste head decodes nothing")

    return Candidates(x, sigma, 100.0, torch.full_like(x, float("nan")), no_decoder)


def test_scores_follow_the_rule_and_the_noise_level(fitted):
    x = torch.zeros(3, 2, 4, 8, 8)
    x[:, :, 0] += torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None]
    scores = fitted.head.score(candidates(x), ["a", "b"])
    assert scores.shape == (3, 2) and scores.dtype == torch.float32
    assert bool((scores[0] < scores[1]).all() and (scores[1] < scores[2]).all())
    torch.testing.assert_close(scores[:, 0], scores[:, 1])
    noisier = fitted.head.score(candidates(x * 1.0, sigma=8.0), ["a", "b"])
    assert float((noisier[2] - noisier[0]).mean()) < float((scores[2] - scores[0]).mean())


def test_larger_latents_are_scored(fitted):
    assert fitted.head.score(candidates(torch.randn(2, 1, 4, 64, 48)), ["a"]).isfinite().all()


def test_a_file_is_read_back(fitted, tmp_path):
    save_taste(fitted.head, tmp_path / "mine.safetensors")
    read = load(tmp_path / "mine.safetensors")
    assert describe_preference(tmp_path / "mine.safetensors").sees == "noisy latents"
    assert describe_preference("demo").sees == "denoised latents"
    assert isinstance(read, TasteHead) and read.facts == fitted.head.facts and not read.needs_pixels
    x = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(read.score(candidates(x), ["a"] * 3), fitted.head.score(candidates(x), ["a"] * 3))
    with pytest.warns(UserWarning, match="was made for sd15, the checkpoint is sdxl"):
        load(tmp_path / "mine.safetensors", architecture="sdxl")


def test_a_damaged_file_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "bad.safetensors", {"spo_preference": "taste", "width": "8"})
    with pytest.raises(SpoError, match='"bad.safetensors" is a damaged taste head'):
        load(tmp_path / "bad.safetensors")


def test_the_pair_that_divides_the_members_is_chosen():
    torch.manual_seed(0)
    head = TasteHead([TasteNetwork(4), TasteNetwork(4)], TasteFacts())
    same = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    assert choose_pair(head, [same, torch.randn(2, 4, 8, 8) * 3, same]) == 1
    assert choose_pair(None, [same] * 5, seed=1) in range(5)
    assert len({choose_pair(None, [same] * 5, seed=n) for n in range(20)}) > 1


def test_a_rollout_evaluates_only_who_goes_on(fitted):
    config = build_config({"checkpoint": "x", "prompts": "x", "preference": "x", "output": "x"}, "sd15")
    settings = RolloutSettings(threshold=0.0, divert_start_step=15)

    def run(preference):
        host = TinyHost(config)
        host.prepare(["a"])
        return host, host.rollout(["a"], [1], settings, preference, None)

    host, rolled = run(fitted.head)
    assert host.evaluations == 2 * 20
    assert len(rolled.pools) == 5
    other, usual = run(MeanOfChannel())
    assert other.evaluations == 2 * (16 + 4 * 4)
    torch.testing.assert_close(rolled.x, usual.x)  # the same parents, whoever judges


def test_an_inner_window_is_evaluated_until_its_end(fitted):
    config = build_config({"checkpoint": "x", "prompts": "x", "preference": "x", "output": "x"}, "sd15")
    host = TinyHost(config)
    host.prepare(["a"])
    settings = RolloutSettings(candidates=2, inner_steps=3, threshold=0.0, divert_start_step=12)
    host.rollout(["a"], [1], settings, fitted.head, None)
    assert host.evaluations == 2 * (14 + 6 * 2)


def test_the_plan_counts_what_a_taste_head_saves(fitted, tmp_path):
    from spo.checkpoint.inspect import inspect_checkpoint
    from spo.demo.run import demo_config
    from spo.headless.plan import make_plan

    save_taste(fitted.head, tmp_path / "mine.safetensors")

    def evaluations(preference: str) -> int:
        config = demo_config(tmp_path, {"preference": preference})
        return make_plan(config, inspect_checkpoint(config.model.checkpoint), ["ghost"]).network_evaluations

    assert evaluations("demo") == 2 * (5 + 4 * 15)
    assert evaluations(str(tmp_path / "mine.safetensors")) == 2 * 20
