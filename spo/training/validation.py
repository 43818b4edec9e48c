"""Watching while training: pictures of fixed prompts and seeds, sampled with the LoRA as it is, and what judges say.

Prompts, seeds and noise are the same at every check and are never used by training, which a check leaves as it was: it
draws from no random numbers but its own, and changes no object of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from spo.algorithm.preference import Candidates, PreferenceModel
from spo.algorithm.rollout import RolloutSettings
from spo.config import Config
from spo.evaluation.measures import diversity, drift, rms_distance
from spo.preference.small_decode import SmallDecode
from spo.progress import StopRequested, Watcher
from spo.rng import stable_seed
from spo.training.host import Host
from spo.training.memory import Portion, Portions, ScoredInPortions, in_portions
from spo.training.processes import ALONE, Processes, share_of
from spo.training.stages import Check

JUDGED_AT_A_TIME = 16  # pictures
FEATURES_PX = 32  # pictures are compared at this size
_LESS_MEMORY = "choose a smaller judge, or none, resume with precision float16, or close other programs"


class Judge(Protocol):
    """What a check needs of a judge; `evaluation.judges.Judge` is one."""

    @property
    def name(self) -> str: ...

    @property
    def adherence(self) -> str:
        """In what its scores say how well a picture shows its prompt, "" where they do not."""
        ...

    def scores(self, pixels: Tensor, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N] of finished pictures [N, 3, H, W] in [-1, 1] and their latents [N, 4, h, w]; a higher one is better."""
        ...


@dataclass(frozen=True)
class Judges:
    """Who judges the checks of a run, beside the preference model: models that it does not follow; None: nobody."""

    judge: Judge | None = None
    adherence: Judge | None = None

    def __bool__(self) -> bool:
        return self.judge is not None or self.adherence is not None


def prompts_of_checks(config: Config, prompts: Sequence[str]) -> list[str]:
    """Those configured, or `validate_count` of training's, spread over them."""
    different = list(dict.fromkeys(prompts))
    count = min(config.validation.validate_count, len(different))
    given = list(dict.fromkeys(config.validation.validate_prompts))
    return given or [different[i * len(different) // count] for i in range(count)]


def measure(
    host: Host,
    config: Config,
    prompts: Sequence[str],
    step: int,
    preference: PreferenceModel | None,
    judges: Judges,
    portions: Portions,
    watcher: Watcher,
    base: Tensor | None,
    processes: Processes = ALONE,
) -> tuple[Check, Tensor]:
    """(check, features of its pictures) of the network as it is.

    prompts     `prompts_of_checks`, prepared; step: of the LoRA, 0: the base
    preference  None: training follows given pairs, and `score` stays empty
    base        the base's features, None for the base itself
    processes   among which the pictures are dealt out; all get what all measured

    A portion at a time, fewer when memory runs out; raises StopRequested between two of them when a stop is wanted.
    """
    count = config.validation.validate_pictures
    rows = [prompt for prompt in prompts for _ in range(count)]
    seeds = [stable_seed("validation", config.run.seed, prompt, i) for prompt in prompts for i in range(count)]
    portions = replace(portions, prompts=replace(portions.prompts), judged=replace(portions.judged))  # training's stay
    if isinstance(preference, SmallDecode):  # which counts its agreement with the full decode over training's pools
        preference = preference.model
    scorer = None if preference is None else ScoredInPortions(preference, host, portions, watcher.log)
    plain = RolloutSettings(candidates=1, eta=config.rollout.eta)

    def pictures(some: range) -> tuple[Tensor, Tensor, Tensor]:
        if watcher.should_stop():
            raise StopRequested
        part = slice(mine.start + some.start, mine.start + some.stop)
        rollout = host.rollout(rows[part], seeds[part], plain, None, None)
        text = host.text_features(rows[part])
        pool = Candidates(rollout.x[None], rollout.sigma, 0.0, rollout.x[None], host.decode, text)
        scores = torch.full((len(rollout.x),), torch.nan)
        if scorer is not None:
            scores = scorer.score(pool, rows[part])[0].float().cpu()
        return pool.pixels()[0].clamp(-1, 1).float().cpu(), rollout.x.float().cpu(), scores

    def lessen() -> str | None:
        return portions.prompts.halve() or portions.lessen_scoring(host)

    def judged(judge: Judge, wanted: Sequence[str], pixels: Tensor, latents: Tensor) -> Tensor:
        def some(of: range) -> Tensor:
            part, prompts = slice(of.start, of.stop), wanted[mine.start + of.start : mine.start + of.stop]
            scores = judge.scores(pixels[part], latents[part], prompts)
            # of one picture that shows something else the logarithm can be as low as it likes
            return scores.exp() if judge.adherence == "log-probability" else scores

        portion = Portion("pictures judged at a time", JUDGED_AT_A_TIME)
        return torch.cat(in_portions(some, len(mine), portion, watcher.log, _LESS_MEMORY))

    def measured() -> dict[str, Tensor]:
        """Of this process's pictures."""
        if not mine:
            return {}
        parts = in_portions(pictures, len(mine), portions.prompts, watcher.log, _LESS_MEMORY, lessen=lessen)
        pixels, latents, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        values = {"features": _features(pixels)}
        if preference is not None:
            values["score"] = scores
        if judges.judge is not None:
            values["judge"] = judged(judges.judge, rows, pixels, latents)
        if judges.adherence is not None:
            values["adherence"] = judged(judges.adherence, rows, pixels, latents)
            if base is None:
                values["chance"] = judged(judges.adherence, others, pixels, latents)
        return values

    mine = share_of(processes, range(len(rows)))
    others = [*rows[count:], *rows[:count]]  # each picture with the next prompt
    shares = [share for share in processes.gather(measured) if share]
    values = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
    features = values["features"]

    def by_prompt(name: str) -> tuple[float, ...]:
        return _by_prompt(values[name], count) if name in values else ()

    check = Check(
        step,
        score=by_prompt("score"),
        judge=by_prompt("judge"),
        adherence=by_prompt("adherence"),
        chance=by_prompt("chance"),
        diversity=tuple(diversity(features, rows, rms_distance).tolist()),
        drift=() if base is None else _by_prompt(drift(base, features, rms_distance), count),
    )
    return check, features


def _by_prompt(values: Tensor, count: int) -> tuple[float, ...]:
    return tuple(values.double().view(-1, count).mean(1).tolist())


def _features(pixels: Tensor) -> Tensor:
    """[N, D] float32: the pictures, small."""
    height, width = pixels.shape[-2:]
    scale = min(1.0, FEATURES_PX / min(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return torch.nn.functional.interpolate(pixels, size, mode="area").flatten(1)
