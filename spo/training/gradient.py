"""The gradient of one update: the pairs' loss by the host's network with and without its adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spo.algorithm.objective import (
    PairDenoiser,
    PairLoss,
    RatioLoss,
    Refinements,
    backward_by_sides,
    dpo_loss,
    pair_loss,
    shift_loss,
    spo_loss,
)
from spo.algorithm.pairs import Pairs
from spo.algorithm.preference import PreferenceModel
from spo.config import Config
from spo.errors import SpoError
from spo.lora.adapter import Adapter
from spo.preference.steer import Steering, full_length
from spo.preference.taste.head import TasteHead
from spo.training.host import Host
from spo.training.live_taste import LiveTaste
from spo.training.memory import Portions


def configured_loss(config: Config) -> RatioLoss:
    """The loss of log ratios that the configuration asks for."""
    if config.loss.method == "dpo":
        return partial(dpo_loss, beta=config.loss.dpo_beta)
    return partial(spo_loss, beta=config.loss.beta, ratio_clamp=config.loss.ratio_clamp)


def configured_refinements(config: Config) -> Refinements:
    """What the configuration asks for beyond the paper."""
    return Refinements(config.loss.step_weight, config.loss.winner_preserving)


def taste_to_learn(config: Config, preference: PreferenceModel | None) -> TasteHead | None:
    """The head that method steer follows, as it is now; None with another method. SpoError where there is none."""
    if config.loss.method != "steer":
        return None
    head = preference.head if isinstance(preference, LiveTaste) else preference
    if not isinstance(head, TasteHead):
        named = "none is given" if head is None else f'"{head.name}" is none'
        raise SpoError(
            f"Method steer learns from a taste head, and {named}: vote on some 50 pairs, fit a head to them and choose "
            "it as the preference model, or take method spo."
        )
    return head


def pair_denoisers(host: Host, adapter: Adapter, prompts: Sequence[str]) -> tuple[PairDenoiser, PairDenoiser]:
    """(policy, reference) for `pair_loss`. prompts: those that `Pairs.image` points into."""

    def policy(x: Tensor, sigma: Tensor, image: Tensor, step: Tensor) -> Tensor:
        return host.denoise(x, sigma, [prompts[i] for i in image.tolist()], step)

    def reference(x: Tensor, sigma: Tensor, image: Tensor, step: Tensor) -> Tensor:
        with adapter.reference():
            return policy(x, sigma, image, step)

    return policy, reference


def accumulate_gradient(
    host: Host,
    adapter: Adapter,
    pairs: Pairs,
    prompts: Sequence[str],
    config: Config,
    loss: RatioLoss,
    portions: Portions,
    scaler: Any,
    share: range | None = None,
    taste: TasteHead | None = None,
) -> list[PairLoss]:
    """Add the gradient of one update's pairs to the adapter's weights, `portions.pairs` at a time; the loss of each.

    share   which of the pairs are evaluated here, None: all; the gradients of all shares add up to that of the update

    As in the published run the mean is taken over `pairs_per_update` pairs, those of one GPU, and then over
    `accumulation` such groups, whatever is evaluated at a time. scaler: see `optimizer.make_scaler`

    taste   of method steer: the loss is then `shift_loss`, and not of log ratios
    """
    policy, reference = pair_denoisers(host, adapter, prompts)
    refinements = configured_refinements(config)
    size, results = config.optimizer.pairs_per_update, []
    groups = math.ceil(len(pairs) / size)
    share = range(len(pairs)) if share is None else share
    scaler.scale(pairs.sigma.new_zeros(()))  # the scale exists from its first use on, also where no pair is evaluated
    for begin in range(0, len(pairs), size):
        end = min(begin + size, len(pairs))
        count = (end - begin) * groups

        def backward(losses: Tensor, count: int = count) -> None:
            scaler.scale(losses.sum() / count).backward()

        stop = min(end, share.stop)
        for first in range(max(begin, share.start), stop, portions.pairs.size):
            rows = torch.arange(first, min(first + portions.pairs.size, stop), device=pairs.sigma.device)
            some = pairs.rows(rows)
            if taste is not None:
                result = _steered_loss(host, policy, reference, some, prompts, config, taste)
                backward(result.loss)
            elif portions.apart and not bool(some.shared.all()):
                result = backward_by_sides(policy, reference, some, loss, backward, config.rollout.eta, refinements)
            else:
                result = pair_loss(policy, reference, some, loss, config.rollout.eta, refinements)
                backward(result.loss)
            results.append(replace(result, loss=result.loss.detach()))
    return results


def _steered_loss(
    host: Host,
    policy: PairDenoiser,
    reference: PairDenoiser,
    pairs: Pairs,
    prompts: Sequence[str],
    config: Config,
    taste: TasteHead,
) -> PairLoss:
    text = None
    if taste.prompt_reader is not None:
        text = host.text_features([prompts[i] for i in pairs.image.tolist()]).to(pairs.x_win.device)
    shift = Steering(taste, config.loss.steer_strength, text).shift(pairs.x_win, pairs.sigma)
    return shift_loss(policy, reference, pairs, shift, full_length(pairs.sigma).to(shift), config.rollout.eta)
