"""The taste head: fitting, refusing, scores, files, choosing pairs, and rollouts that need no prediction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spo.algorithm.diffusion import network_input
from spo.algorithm.preference import Candidates
from spo.algorithm.rollout import RolloutSettings
from spo.checkpoint.tensor_file import open_tensor_file
from spo.config import build_config
from spo.errors import SpoError
from spo.preference.load import describe_preference, load
from spo.preference.taste.head import (
    TasteFacts,
    TasteHead,
    TasteNetwork,
    save_taste,
    squares_of,
    stride_for,
)
from tests.tiny_host import MeanOfChannel, TinyHost
from tests.vote_worlds import text_of


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


# ---- heads for large latents


def filled(width=4):
    """A network whose weights are told by a formula."""
    network = TasteNetwork(width)
    with torch.no_grad():
        for number, value in enumerate(network.parameters()):
            value.copy_((torch.arange(value.numel()).reshape(value.shape) * 0.37 + number).sin() * 0.3)
    return network


def wave(n, h, w):
    return (torch.arange(n * 4 * h * w).reshape(n, 4, h, w) * 0.11).sin()


def test_files_of_before_large_latents_give_the_same_scores(tmp_path):
    """Numbers of the version before heads had a stride; its files do not say one."""
    save_taste(TasteHead([filled()], TasteFacts()), tmp_path / "old.safetensors")
    assert "stride" not in open_tensor_file(tmp_path / "old.safetensors").metadata
    network = load(tmp_path / "old.safetensors").members[0]
    sigma = torch.tensor([0.5, 3.0])
    torch.testing.assert_close(network(wave(2, 8, 8), sigma), torch.tensor([-0.943002, -0.403448]), atol=2e-5, rtol=0)
    torch.testing.assert_close(network(wave(2, 48, 40), sigma), torch.tensor([-1.076939, -0.370008]), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "stride"), [((8, 8), 1), ((31, 64), 1), ((32, 32), 4), ((64, 96), 4), ((128, 144), 8)]
)
def test_the_stride_follows_the_shorter_side(size, stride):
    assert stride_for(torch.empty(2, 4, *size)) == stride


def test_a_strided_head_is_read_back_and_scores_other_sizes(tmp_path):
    torch.manual_seed(0)
    head = TasteHead([TasteNetwork(8, stride=4), TasteNetwork(8, stride=4)], TasteFacts())
    save_taste(head, tmp_path / "large.safetensors")
    read = load(tmp_path / "large.safetensors")
    for size in ((64, 64), (64, 96), (67, 41)):
        x = torch.randn(2, 1, 4, *size)
        assert torch.equal(read.score(candidates(x), ["a"]), head.score(candidates(x), ["a"]))


def test_noise_drawn_after_the_first_layer_is_distributed_as_before_it():
    """Mean and covariance of the features over many draws; without noise the features themselves."""
    torch.manual_seed(1)
    network = TasteNetwork(3, stride=4)
    clean, sigma = torch.randn(1, 4, 8, 8), torch.tensor(1.7)
    squares = squares_of(clean, 4)
    assert squares.shape == (1, 4, 64)

    def pixels(count):
        many = clean.expand(count, -1, -1, -1)
        noisy = many + sigma * torch.randn(many.shape)
        return network.enter(network_input(noisy, sigma.expand(count))).flatten(2).transpose(1, 2)

    def features(count, sigma=sigma):
        noise = torch.randn(count, 4, 3)
        return network.noised_first(squares.expand(count, -1, -1), sigma.expand(count), noise)

    with torch.no_grad():
        plain = network.enter(clean).flatten(2).transpose(1, 2)
        torch.testing.assert_close(features(1, torch.tensor(0.0)), plain, atol=1e-5, rtol=0)
        before, after = pixels(20_000), features(20_000)
    torch.testing.assert_close(before.mean(0), after.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(before.flatten(1).T.cov(), after.flatten(1).T.cov(), atol=0.02, rtol=0)


# ---- heads that read the prompt


def two_kinds(count=2):
    """[2, B] candidates, the second higher in channel 0, for a prompt of each kind in turn, with their text."""
    x = torch.zeros(2, count, 4, 8, 8)
    x[1, :, 0] = 1.0
    return replace(candidates(x), text=torch.stack([text_of(n) for n in range(count)]))


def test_the_prompt_turns_the_score(reading, tmp_path):
    scores = reading.head.score(two_kinds(), ["a", "b"])
    assert float(scores[1, 0] - scores[0, 0]) > 0.2 and float(scores[1, 1] - scores[0, 1]) < -0.2
    save_taste(reading.head, tmp_path / "mine.safetensors")
    metadata = open_tensor_file(tmp_path / "mine.safetensors").metadata
    assert (metadata["text_width"], metadata["prompt_codes"]) == ("6", "6")
    read = load(tmp_path / "mine.safetensors")
    assert torch.equal(read.score(two_kinds(), ["a", "b"]), scores)


def test_what_a_head_cannot_read_is_refused_in_a_sentence(reading):
    wide = replace(two_kinds(), text=torch.zeros(2, 2048))
    with pytest.raises(SpoError, match="reads text features of width 6, and the checkpoint's have 2048; use it with"):
        reading.head.score(wide, ["a", "b"])
    with pytest.raises(SpoError, match='The taste head "by prompt" reads the prompt, and here nothing is known of it'):
        reading.head.score(replace(wide, text=None), ["a", "b"])


def test_a_rollout_tells_the_head_the_prompt(reading):
    config = build_config({"checkpoint": "x", "prompts": "x", "preference": "x", "output": "x"}, "sd15")
    host = TinyHost(config)
    host.prepare(["a"])
    with pytest.raises(SpoError, match="the checkpoint's have 32"):
        host.rollout(["a"], [1], RolloutSettings(threshold=0.0), reading.head, None)
    assert torch.equal(host.text_features(["a"]), host.conditioning(["a"]).cross_attention.mean(1))
