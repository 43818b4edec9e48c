"""Pairs to vote on: what they share, what differs, in any host."""

from __future__ import annotations

import pytest
import torch

from spo.algorithm.rollout import RolloutSettings
from spo.config import build_config
from spo.errors import SpoError
from spo.training.vote_pairs import make_pairs, make_pools
from tests.tiny_host import TinyHost


class PictureHost(TinyHost):
    """The tiny host with a decoder."""

    def decode(self, latents):
        return latents[:, :3].tanh().repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture
def host():
    values = {"checkpoint": "x", "prompts": "x", "preference": "x", "output": "x"}
    made = PictureHost(build_config(values, "sd15"))
    made.prepare(["a", "b"])
    return made


def test_the_first_picture_is_the_seeds_own(host):
    first, second = make_pairs(host, ["a", "b"], [5, 6], from_step=10)
    ordinary = host.rollout(["a", "b"], [5, 6], RolloutSettings(candidates=1), None, None).x
    torch.testing.assert_close(torch.stack([first.latents[0], second.latents[0]]), ordinary)
    assert not torch.equal(first.latents[0], first.latents[1])
    assert first.seed_left == first.seed_right == 5 and first.from_step == 10 and first.prompt == "a"
    assert first.pixels.shape == (2, 3, 64, 64) and first.latents.shape == (2, 4, 8, 8)
    assert (first.architecture, first.checkpoint_name, first.checkpoint_hash) == (
        "sd15",
        "tiny.safetensors",
        "0123456789",
    )


def test_the_earlier_they_part_the_more_they_differ(host):
    def distance(from_step):
        left, right = make_pairs(host, ["a"], [5], from_step)[0].latents
        return float((left - right).abs().mean())

    assert distance(2) > distance(14) > distance(19) > 0


def test_two_seeds(host):
    made = make_pairs(host, ["a", "b"], [5, 6], from_step=None)
    ordinary = host.rollout(["a", "b"], [5, 6], RolloutSettings(candidates=1), None, None).x
    torch.testing.assert_close(torch.stack([pair.latents[0] for pair in made]), ordinary)
    assert made[0].seed_right not in (5, 6, made[1].seed_right) and made[0].from_step == -1
    other = host.rollout(["b"], [made[1].seed_right], RolloutSettings(candidates=1), None, None).x
    torch.testing.assert_close(made[1].latents[1], other[0])


@pytest.mark.parametrize("from_step", [20, -1])
def test_a_step_that_is_none_is_refused(host, from_step):
    with pytest.raises(SpoError):
        make_pairs(host, ["a"], [5], from_step)


@pytest.mark.parametrize("from_step", [10, None])
def test_a_pool_begins_with_its_pair(host, from_step):
    (pool,) = make_pools(host, ["a"], [5], 4, from_step)
    (pair,) = make_pairs(host, ["a"], [5], from_step)
    assert len(pool) == 4 and pool.latents.shape == (4, 4, 8, 8) and pool.pictures[0].size == (64, 64)
    torch.testing.assert_close(pool.latents[0], pair.latents[0])
    torch.testing.assert_close(pool.latents[1], pair.latents[1], rtol=1e-3, atol=1e-3)
    assert pool.seeds[:2] == (pair.seed_left, pair.seed_right) and pool.from_step == pair.from_step
    assert len(set(pool.seeds)) == (1 if from_step else 4)
    distances = [float((pool.latents[i] - pool.latents[j]).abs().mean()) for i in range(4) for j in range(i)]
    assert min(distances) > 0


@pytest.mark.parametrize("place", ["rollout", "decode"])
@pytest.mark.parametrize("from_step", [10, None])
def test_out_of_memory_while_voting_halves_and_goes_on(host, monkeypatch, place, from_step):
    expected = make_pairs(host, ["a", "b"], [5, 6], from_step)
    healthy, trips = getattr(host, place), iter([True])

    def trip(*args):
        if next(trips, False):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return healthy(*args)

    monkeypatch.setattr(host, place, trip)
    with pytest.warns(UserWarning, match="Out of memory: going on with (prompts at a time 1|decode_batch 2)"):
        made = make_pairs(host, ["a", "b"], [5, 6], from_step)
    for one, other in zip(made, expected, strict=True):
        assert (one.prompt, one.seed_left, one.seed_right) == (other.prompt, other.seed_left, other.seed_right)
        torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-5)


def test_out_of_memory_with_one_pair_at_a_time_says_what_to_do(host, monkeypatch):
    def trip(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(host, "rollout", trip)
    with pytest.raises(SpoError, match="smaller width and height"):
        make_pairs(host, ["a"], [5])
