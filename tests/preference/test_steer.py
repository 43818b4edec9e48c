"""Steering: the direction is the gradient's, the length is set, and the caller's modes and latents stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spo.errors import SpoError
from spo.preference.steer import FULL, MAX_STRENGTH, NOISIEST, Steering, steered, steering
from spo.preference.taste.head import PromptReader, TasteFacts, TasteHead, TasteNetwork
from tests.tiny_host import MeanOfChannel


class Linear(nn.Module):
    """A member whose gradient is known: it likes the weights' direction, more the less noise there is."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, codes: object = None) -> torch.Tensor:
        assert latents.dtype == sigma.dtype == torch.float32
        return (latents * self.weight).flatten(1).sum(1) / (1 + sigma)


def linear_head(*weights: torch.Tensor) -> TasteHead:
    return TasteHead([Linear(weight) for weight in weights], TasteFacts(name="known"))


def random_head() -> TasteHead:
    torch.manual_seed(3)
    return TasteHead([TasteNetwork(8), TasteNetwork(8)], TasteFacts())


def rms(values: torch.Tensor) -> torch.Tensor:
    return values.square().flatten(1).mean(1).sqrt()


def test_the_shift_is_the_gradient_at_the_length_of_the_strength():
    first, second = torch.randn(4, 8, 8), torch.randn(4, 8, 8)
    sigma = torch.tensor([2.0, 1.0, 0.03])
    shift = Steering(linear_head(first, second), 0.5).shift(torch.randn(3, 4, 8, 8), sigma)
    mean = (first + second) / 2
    expected = mean / mean.square().mean().sqrt() * 0.5 * FULL
    for n, share in enumerate(sigma / (1 + sigma**2).sqrt()):
        torch.testing.assert_close(shift[n], expected * share)


def test_one_strength_is_as_long_for_every_head_size_and_strength_of_its_scores():
    sigma = torch.full((2,), 2.0)
    share = 2 / 5**0.5
    for head in (random_head(), linear_head(torch.randn(4, 1, 1) * 1e-12), linear_head(torch.randn(4, 1, 1) * 1e6)):
        for size in ((8, 8), (24, 16)):
            shift = Steering(head, 1.0).shift(torch.randn(2, 4, *size), sigma)
            torch.testing.assert_close(rms(shift), torch.full((2,), FULL * share))


def test_it_follows_what_the_head_scores():
    """Central differences along the shift, and against its sign: the score rises with it and falls against it."""
    head, x, sigma = random_head(), torch.randn(5, 4, 8, 8), torch.full((5,), 0.8)
    shift = Steering(head, 1.0).shift(x, sigma)
    up, down = (head.member_scores(x + sign * 1e-2 * shift, 0.8).mean(0) for sign in (1, -1))
    assert bool((up > down).all())
    torch.testing.assert_close(Steering(head, -1.0).shift(x, sigma), -shift)


def test_much_noise_is_left_alone_image_by_image():
    x, levels = torch.randn(3, 4, 8, 8), torch.tensor([14.0, NOISIEST + 0.1, NOISIEST])
    assert Steering(random_head(), 1.0).shift(x, levels).flatten(1).any(1).tolist() == [False, False, True]
    assert not Steering(None, 1.0).shift(x[:2], levels[:2]).any()  # the head is not even asked


def test_pictures_do_not_depend_on_their_batch():
    head, x, sigma = random_head(), torch.randn(3, 4, 8, 8), torch.tensor([5.0, 1.0, 0.1])
    together = Steering(head, 1.0).shift(x, sigma)
    alone = torch.cat([Steering(head, 1.0).shift(x[n : n + 1], sigma[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_samplers_modes_do_not_matter_and_stay(mode):
    head, sigma = random_head(), torch.full((2,), 2.0)
    x = torch.randn(2, 4, 8, 8)
    expected = Steering(head, 1.0).shift(x, sigma)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        inside = x.clone()
        shift = Steering(head, 1.0).shift(inside, sigma.clone())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        assert torch.equal(shift, expected) and not shift.requires_grad and torch.equal(inside, x)
    assert all(weight.grad is None for weight in head.members.parameters())


def test_half_precision_is_left_for_the_gradient():
    head, x = random_head(), torch.randn(2, 4, 8, 8).half()
    shift = Steering(head, 1.0).shift(x, torch.full((2,), 2.0, dtype=torch.float16))
    assert shift.dtype == torch.float32
    torch.testing.assert_close(shift, Steering(head, 1.0).shift(x.float(), torch.full((2,), 2.0)))


def test_a_denoiser_is_bent_by_the_shift():
    head, x, sigma = random_head(), torch.randn(2, 4, 8, 8), torch.full((2,), 2.0)
    by = Steering(head, 0.5)
    bent = steered(lambda x, sigma, offset: x * 0.1 + offset, by)
    torch.testing.assert_close(bent(x, sigma, offset=3.0), x * 0.1 + 3 + by.shift(x, sigma))


def test_what_cannot_steer_is_refused():
    with pytest.raises(SpoError, match="cannot steer: the gradient of its score would go through"):
        steering(MeanOfChannel(), 1.0)
    for strength in (MAX_STRENGTH + 0.1, float("nan")):
        with pytest.raises(SpoError, match="strength is .*; accepted are -2 to 2"):
            steering(random_head(), strength)
    with pytest.raises(SpoError, match="reads latents of 4 channels, and these have 16"):
        Steering(random_head(), 1.0).shift(torch.randn(1, 16, 8, 8), torch.ones(1))
    with pytest.raises(SpoError, match="no finite gradient at sigma 1"):
        Steering(random_head(), 1.0).shift(torch.full((1, 4, 8, 8), float("nan")), torch.ones(1))


def test_steering_follows_the_prompt():
    torch.manual_seed(0)
    members = [TasteNetwork(8, codes=3), TasteNetwork(8, codes=3)]
    for member in members:
        torch.nn.init.normal_(member.by_prompt[1].weight, std=3.0)
    head = TasteHead(members, TasteFacts(), PromptReader(torch.zeros(5), torch.randn(3, 5)))
    x, sigma, text = torch.randn(2, 4, 8, 8), torch.ones(2), torch.randn(2, 5)
    both = Steering(head, 1.0, text).shift(x, sigma)
    alone = Steering(head, 1.0, text[1:]).shift(x[1:], sigma[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    other = Steering(head, 1.0, -text).shift(x, sigma)
    assert float((both * other).flatten(1).sum(1).max()) < float((both * both).flatten(1).sum(1).min()) * 0.9
    with pytest.raises(SpoError, match="nothing is known of it"):
        Steering(head, 1.0).shift(x, sigma)
