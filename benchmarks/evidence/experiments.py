"""The experiments: which runs each one has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.evidence.runs import Run

BUDGET = 6300  # evaluations: three rollouts of ten prompts and what is trained on them, with K = 4
RATE = 1e-3
BEST_RATE = {"SPO": 3e-3, "DPO": 3e-3}  # of the grids: the most taste with 98 % of subjects, within the budget


def learning_rates(seed: int) -> list[Run]:
    """SPO at a grid of learning rates, with stops on the way."""
    stops = (BUDGET // 3, 2 * BUDGET // 3, BUDGET)
    return [
        Run("learning rate", f"{rate:g}", seed, {"learning_rate": rate}, stops=stops) for rate in (3e-4, 1e-3, 3e-3)
    ]


def ablations(seed: int) -> list[Run]:
    """The paper's ablations at one budget."""

    def run(variant: str, wrapper: str = "", scorer: str = "", **changes: Any) -> Run:
        settings = {"learning_rate": RATE, **changes}
        return Run("ablations", variant, seed, settings, wrapper, (BUDGET,), scorer=scorer)

    return [
        run("paper"),
        run("best parent", "best parent"),
        run("told timestep 0", "blind"),
        run("verdict at the end", inner_steps=15),
        run("K 8", candidates=8),
        run("K 2", candidates=2),
        run("timesteps 0-1000", divert_start_step=0),
        run("timesteps 0-500", timestep_max=501),
        run("timesteps 500-750", timestep_min=500),
        run("threshold 0", threshold=0.0),
        run("threshold 0.5", threshold=0.5),
        run("inner steps 3", inner_steps=3),
        run("noisy input", "noisy"),
        run("scorer of finished pictures", "blind", "finished"),
        run("scorer of noisy latents", "noisy", "noisy"),
    ]


def options(seed: int) -> list[Run]:
    """What later papers change, at the same budget; beside the ablations' run "paper"."""

    def run(variant: str, scorer: str = "", **changes: Any) -> Run:
        return Run("options", variant, seed, {"learning_rate": RATE, **changes}, "", (BUDGET,), scorer=scorer)

    return [
        run("step_weight equal", step_weight="equal"),
        run("step_weight gradspo", step_weight="gradspo"),
        run("rollout_average 0.9", rollout_average=0.9),
        run("threshold 0.1 to 0.3", threshold_noisiest=0.3),
        run("LPO", threshold=0.35, threshold_noisiest=0.5, beta=500.0, divert_start_step=0),
        run("winner_preserving 0.9", winner_preserving=0.9),
        run("teaching_share 0.5", teaching_share=0.5),
        run("mixed with adherence", preference="0.8*demo + 0.2*demo-adherence"),
        run("taste head", "taste"),
        run("steer by the taste head", "taste", method="steer"),
    ]


DPO = {"method": "dpo", "prompts_per_batch": 20}  # a batch is an update's pairs


def dpo_rates(seed: int) -> list[Run]:
    """Diffusion-DPO at a grid of learning rates."""
    rates = (1e-3, 3e-3, 3e-4)
    return [Run("dpo rate", f"{rate:g}", seed, {**DPO, "learning_rate": rate}, stops=(BUDGET,)) for rate in rates]


def dpo(seed: int) -> list[Run]:
    """Diffusion-DPO and SPO, each at its best rate, over the cost of training."""
    by_dpo = {**DPO, "learning_rate": BEST_RATE["DPO"]}
    sparing = {**by_dpo, "winner_preserving": 0.9}
    return [
        Run("dpo", "DPO", seed, by_dpo, stops=(BUDGET // 3, BUDGET)),
        Run("dpo", "SPO", seed, {"learning_rate": BEST_RATE["SPO"]}, stops=(BUDGET // 3, 2 * BUDGET // 3)),
        Run("dpo", "DPO winner_preserving 0.9", seed, sparing, stops=(BUDGET,)),
    ]


def second_taste(seed: int) -> list[Run]:
    """Sharp over blurred, which strength of colour cannot cheat."""
    stops = (BUDGET // 2, BUDGET)
    return [Run("second taste", "sharpness", seed, {"learning_rate": RATE}, "", stops, "sharpness", "sharpness")]


EXPERIMENTS: dict[str, Callable[[int], list[Run]]] = {
    "learning_rate": learning_rates,
    "ablations": ablations,
    "options": options,
    "dpo_rates": dpo_rates,
    "dpo": dpo,
    "second_taste": second_taste,
}
