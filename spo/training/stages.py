"""Which stage of a run is the best, and whether its pictures get worse while its score rises.

A check (see `validation`) measures pictures of the same prompts and seeds every time, so that two stages are compared
prompt by prompt: what differs is the LoRA alone. All is said of the mean difference over prompts, with its 95 %
interval from the bootstrap over prompts (`evaluation.interval`).

The rules:

- **Lost**: of what separates the base's pictures of their own prompts from those of other prompts, a stage's pictures
  lost more than `TOLERATED["adherence"]`; or, of the base's differences between seeds, more than
  `TOLERATED["diversity"]`; and the interval of the loss lies above 0, so that chance does not explain it.
- **Best**: of the stages that lost neither, the one with the judge's highest mean score. Never the score of the model
  that training follows, nor the loss or the ratios: they are what goes wrong first.
- **Decline**: in two checks in a row, the same thing is worse: it is lost as said above; or the judge's score is below
  that of the best check before, the interval of the difference below 0; or more than `CLAMPED` of the pairs had a
  clamped ratio, and more than at the check before. Two in a row, since one interval in twenty errs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from spo.config import ValidationConfig
from spo.evaluation.interval import Interval, bootstrap_interval

TOLERATED = {"adherence": 0.02, "diversity": 0.2}  # shares of the base's; by benchmarks/chosen_stage.py
CLAMPED = 0.3  # of the trained pairs
_WORDS = {"adherence": "adherence to the prompts", "diversity": "diversity between seeds"}


@dataclass(frozen=True)
class Check:
    """What one check measured: a number for each prompt, the mean over its pictures; () where nobody measures it.

    step       the update after which it was made, 0: the base
    score      by the preference model that training follows; judge: by the one that it does not
    adherence  how well pictures show their prompts; chance: how well the base's show other prompts, of the base only
    diversity  distance between a prompt's pictures; drift: from the base's pictures of the same seeds
    clamped    share of the pairs trained on since the check before whose ratio was clamped; NaN: there were none
    """

    step: int
    score: tuple[float, ...]
    judge: tuple[float, ...] = ()
    adherence: tuple[float, ...] = ()
    chance: tuple[float, ...] = ()
    diversity: tuple[float, ...] = ()
    drift: tuple[float, ...] = ()
    clamped: float = math.nan


@lru_cache(maxsize=4096)  # the rows of all checks are made anew after each
def gain(check: Check, other: Check, name: str) -> Interval | None:
    """By how much `name`, a field of Check, is above another check's, over prompts; None where it was not measured."""
    now, before = getattr(check, name), getattr(other, name)
    return bootstrap_interval([a - b for a, b in zip(now, before, strict=True)]) if now and before else None


@lru_cache(maxsize=4096)
def loss(check: Check, base: Check, name: str) -> Interval | None:
    """The share of the base's "adherence" (above that for other prompts) or "diversity" that is lost; below 0: gained.

    None where it was not measured, and for a measure of adherence to which prompts do not matter.
    """
    now, before = getattr(check, name), getattr(base, name)
    whole = mean(before) - (mean(base.chance) if name == "adherence" else 0.0)
    if not now or not whole > 0:
        return None
    return bootstrap_interval([(b - a) / whole for a, b in zip(now, before, strict=True)])


def lost(check: Check, base: Check) -> dict[str, Interval]:
    """What a stage lost, chance apart, and more of it than is tolerated: "adherence", "diversity"."""
    shares = {name: loss(check, base, name) for name in TOLERATED}
    return {name: one for name, one in shares.items() if one and one.mean > TOLERATED[name] and one.low > 0}


def worse(checks: Sequence[Check]) -> dict[str, str]:
    """What the last of the checks, of which the first is the base's, found worse: name -> in words."""
    base, last, before = checks[0], checks[-1], checks[:-1]
    found = {
        name: f"{share.mean:.0%} of the {_WORDS[name]} is lost (95 % interval {share.low:.0%} to {share.high:.0%})"
        for name, share in lost(last, base).items()
    }
    highest = max(before, key=lambda check: mean(check.judge), default=last)
    fall = gain(last, highest, "judge")
    if fall is not None and fall.high < 0:
        found["judge"] = f"the held-out judge's score fell by {-fall.mean:.3g} from that at update {highest.step}"
    if last.clamped > CLAMPED and before and not last.clamped <= before[-1].clamped:
        found["clamped"] = f"the share of pairs with a clamped ratio climbed to {last.clamped:.0%}"
    return found


def decline(checks: Sequence[Check]) -> str:
    """What the last two checks both found worse, in a sentence; "" when nothing."""
    if len(checks) < 3:
        return ""
    before, now = worse(checks[:-1]), worse(checks)
    certain = [text for name, text in now.items() if name in before]
    if not certain:
        return ""
    rise = gain(checks[-1], checks[0], "score")
    rising = f", while the score that training follows rose by {rise.mean:.3g}" if rise and rise.low > 0 else ""
    what = "Training leaves its reference" if set(before) & set(now) == {"clamped"} else "Pictures get worse"
    return f"{what}: at update {checks[-1].step}, as at the check before, {' and '.join(certain)}{rising}."


@dataclass
class Stages:
    """The checks of a run and the weights of its best stage. A survivor of the run's state.

    checks     oldest first, the base's before all others
    best_step  of the best stage, 0 while there is none; weights: its own, by the adapter's names, on the CPU
    features   of the base's pictures, for drift
    clamped, pairs  since the last check: pairs whose ratio was clamped, and all that were trained on
    """

    checks: list[Check] = field(default_factory=list)
    best_step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    clamped: int = 0
    pairs: int = 0

    def due(self, step: int, every: int, done: bool) -> bool:
        """Whether a check is to be made after update `step`: of the base, every so many updates, and at the end."""
        if self.checks and self.checks[-1].step >= step:
            return False
        return not self.checks or step % every == 0 or done

    def trained(self, clamped: Sequence[bool]) -> None:
        """An update was made: for each of its pairs, whether its ratio was clamped."""
        self.clamped += sum(clamped)
        self.pairs += len(clamped)

    def add(self, check: Check, features: Tensor, weights: Mapping[str, Tensor]) -> bool:
        """Take a check, its pictures' features and its stage's weights; whether that stage is the best so far."""
        self.checks.append(dataclasses.replace(check, clamped=self.clamped / self.pairs if self.pairs else math.nan))
        self.clamped = self.pairs = 0
        if self.features is None:
            self.features = features
        eligible = check.step > 0 and bool(check.judge) and not lost(check, self.checks[0])
        if not eligible or (self.best_step and mean(check.judge) <= mean(self._best.judge)):
            return False
        self.best_step = check.step
        self.weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
        return True

    @property
    def _best(self) -> Check:
        return next(check for check in self.checks if check.step == self.best_step)

    def over(self, settings: ValidationConfig) -> str:
        """Why the run shall end now, in a sentence; "" while it shall not."""
        if settings.on_decline == "stop" and decline(self.checks):
            return f"Training ends at update {self.checks[-1].step}, before it gets worse."
        without = sum(check.step > self.best_step for check in self.checks if check.judge)
        if settings.patience and without >= settings.patience:
            return f"Training ends at update {self.checks[-1].step}: the last {without} checks gave no better stage."
        return ""

    def news(self, settings: ValidationConfig) -> list[str]:
        """What the log says of the last check: its numbers, a warning when a decline begins, why the run ends."""
        check, base = self.checks[-1], self.checks[0]
        parts = [f"Check at update {check.step}" if check.step else "Check of the base"]
        for name, title in (("judge", "held-out judge"), ("score", "score trained on")):
            rise = gain(check, base, name)
            if rise and check.step:
                parts.append(f"{title} {rise.mean:+.3g} ({rise.low:+.3g} to {rise.high:+.3g})")
        for name in TOLERATED:
            share = loss(check, base, name)
            if share and check.step:
                parts.append(f"{name} {-share.mean:+.0%}")
        best = ["the best stage so far"] if check.step and check.step == self.best_step else []
        texts = [", ".join([*parts, *best]) + "."]
        warning = decline(self.checks)
        if warning and settings.on_decline != "ignore" and not decline(self.checks[:-1]):
            texts.append(f"Warning: {warning}")
        return [text for text in (*texts, self.over(settings)) if text]

    def verdict(self, step: int, *, finished: bool) -> str:
        """What came of it, for the end of a run after update `step`, or for a stop."""
        if not self.checks or not self.checks[0].judge:
            return ""
        if not self.best_step:
            if step == 0:
                return ""
            return (
                "No stage kept its adherence and diversity, so the LoRA is the last one: train more gently, or choose "
                "a stage by eye."
            )
        rise = gain(self._best, self.checks[0], "judge")
        assert rise is not None
        text = (
            f"The best stage by the held-out judge is that of update {self.best_step}: {rise.mean:+.3g} against the "
            f"base (95 % interval {rise.low:+.3g} to {rise.high:+.3g})."
        )
        if finished and self.best_step != step:
            text += f" It is the LoRA; the last one, of update {step}, is kept as a stage."
        if not rise.low > 0:
            text += " That is no certain gain."
        return text

    def rows(self) -> list[dict[str, float]]:
        """Those of validation.csv, see `runs.metrics.CHECK_TITLES`."""
        return [self._row(check) for check in self.checks]

    def _row(self, check: Check) -> dict[str, float]:
        base = self.checks[0]
        row: dict[str, float] = {"step": check.step}
        for names, change, of in ((("score", "judge"), "gain", gain), (TOLERATED, "lost", loss)):
            for name in names:
                row[name] = mean(getattr(check, name))
                share = of(check, base, name)
                if share:
                    row |= {f"{name}_{change}": share.mean}
                    row |= {f"{name}_{change}_low": share.low, f"{name}_{change}_high": share.high}
        row |= {"drift": mean(check.drift), "clamped_share": check.clamped}
        row["best"] = int(check.step == self.best_step and check.step > 0)
        return {name: value for name, value in row.items() if not math.isnan(value)}

    def state_dict(self) -> dict[str, Any]:
        """See `runs.state.Stateful`."""
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        checks = [{name: _plain(value) for name, value in vars(check).items()} for check in self.checks]
        return {**own, "checks": checks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `runs.state.Stateful`."""
        for name, value in state.items():
            setattr(self, name, value)
        self.checks = [_check_of(plain) for plain in state["checks"]]


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def _check_of(plain: Mapping[str, Any]) -> Check:
    values: dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in plain.items()}
    return Check(**values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
