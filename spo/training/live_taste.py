"""Train while voting: a taste head that is refitted between rollouts, to votes on pictures of the policy as it is then.

A head fitted before the run knows the checkpoint's pictures; the further the policy moves, the less it says about what
is drawn now. Here the run itself lays pools of its own pictures into the vote folder's `waiting/`, where whoever votes
finds them, and before each rollout looks how many votes there are: after every few it fits the head anew to all.

The head belongs to the run's state, which is saved with every new one: a run that was stopped or killed goes on with
the head that it had, bit for bit. Votes are on disk before the run knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.algorithm.preference import Candidates, PreferenceModel
from spo.config import Config
from spo.errors import SpoError
from spo.preference.taste.fit import FittedTaste, VoteSet, fit_taste, read_vote_set
from spo.preference.taste.head import TasteHead, networks_of, tensors_of
from spo.preference.taste.votes import VoteFolder
from spo.preference.taste.waiting import WaitingPools
from spo.rng import permutation, stable_seed
from spo.training.host import Host
from spo.training.vote_pairs import make_pools

AHEAD = 6  # pools that wait for a vote, at most
REFIT_EVERY = 10  # votes
_FROM_STEP = 0.2  # of the ladder: where the pictures of a pool part ways
_AT_ONCE = 4  # pools made before one rollout


class LiveTaste:
    """The `PreferenceModel` of such a run; also `Stateful`.

    head    the one to begin with; votes: the folder that it is refitted to
    fit     how; say: told how good each new head is
    size    pictures of a pool
    """

    needs_pixels = False
    needs_denoised = False

    def __init__(
        self,
        head: TasteHead,
        votes: VoteFolder,
        *,
        fit: Callable[[VoteSet], FittedTaste] = fit_taste,
        say: Callable[[str], object] = lambda text: None,
        size: int = 2,
        refit_every: int = REFIT_EVERY,
    ) -> None:
        self.head, self.votes, self.waiting = head, votes, WaitingPools(votes)
        self.fit, self.say, self.size, self.refit_every = fit, say, size, refit_every
        self.name, self.fitted_to = head.name, head.facts.votes

    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32; see `PreferenceModel`."""
        return self.head.score(candidates, prompts)

    def before_rollout(self, host: Host, config: Config, prompts: Sequence[str], batch: int) -> bool:
        """Refit the head where enough votes have come, and lay out pictures of the policy; whether the head is new.

        host     with the adapter in place; prompts: the run's, which it knows
        batch    number of the rollout that follows: with the seed it fixes prompts and noise
        """
        refitted = self._refit()
        self._lay_out(host, config, prompts, batch)
        return refitted

    def _refit(self) -> bool:
        count = sum(1 for vote in self.votes.votes() if vote.answer != "skip")
        if count < self.fitted_to + self.refit_every:
            return False
        self.fitted_to = count  # also when it fails: the next try comes with as many more
        try:
            with torch.enable_grad():
                fitted = self.fit(read_vote_set(self.votes))
        except SpoError as error:
            self.say(f"The taste head stays as it is. {error}")
            return False
        self.head = fitted.head
        self.head.name = self.name
        right = fitted.report.accuracies[0].share
        self.say(f"The taste head is fitted to {count} votes now, right about {right:.0%} of those held out.")
        return True

    def _lay_out(self, host: Host, config: Config, prompts: Sequence[str], batch: int) -> None:
        policy = policy_name(host.checkpoint_name, Path(config.run.output).stem)
        waiting = [pool for pool in self.waiting.to_vote_on() if pool.checkpoint_name == policy]
        lacking = min(_AT_ONCE, AHEAD - len(waiting))
        if lacking <= 0:
            return
        places = [stable_seed(config.run.seed, "to vote on", batch, n) for n in range(lacking)]
        chosen = [prompts[place % len(prompts)] for place in places]
        seeds = [stable_seed(place) % 2**32 for place in places]
        from_step = round(_FROM_STEP * config.rollout.sampling_steps)
        pools = make_pools(host, chosen, seeds, self.size, from_step, config.rollout.eta)
        for place, pool in zip(places, pools, strict=True):
            self.waiting.add(replace(pool.shuffled(permutation(len(pool), place)), checkpoint_name=policy))

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        first: Any = self.head.members[0]
        return {"fitted_to": self.fitted_to, "members": tensors_of(self.head), "prompt_codes": first.codes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Stateful`. Raises SpoError for the members of another kind of head."""
        first: Any = self.head.members[0]
        codes = state.get("prompt_codes", 0)  # a head may have begun to read the prompt on the way
        try:
            members, reader = networks_of(state["members"], len(self.head.members), first.width, first.stride, codes)
        except (KeyError, RuntimeError) as error:
            raise SpoError("The run's taste head is of another size than the one given; take its own.") from error
        place = first.enter.weight.device
        self.head = TasteHead(members, self.head.facts, reader)
        self.head.name = self.name
        self.head.members.to(place)
        self.fitted_to = int(state["fitted_to"])


def policy_name(checkpoint_name: str, run: str) -> str:
    """What the pictures of a run's policy are filed under, beside those of the checkpoint itself."""
    return f"{checkpoint_name} + {run}"


def live_taste(
    config: Config,
    preference: PreferenceModel,
    fit: Callable[[VoteSet], FittedTaste] = fit_taste,
    say: Callable[[str], object] = lambda text: None,
) -> PreferenceModel:
    """`preference`, or with `live_votes` the head that begins as it. Raises SpoError where that is no taste head."""
    if not config.preference.live_votes:
        return preference
    if not isinstance(preference, TasteHead):
        raise SpoError(
            f'live_votes needs a taste head to begin with; "{preference.name}" is none: vote on some 50 pairs of the '
            "checkpoint first, fit a head to them, and choose it as the preference model."
        )
    return LiveTaste(preference, VoteFolder(config.preference.live_votes), fit=fit, say=say)
