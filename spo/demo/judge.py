"""The demonstration's judge: the rule of taste, which training never sees, and whether the subject is recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spo.demo.rule import colourfulness
from spo.demo.subjects import load as load_classifier
from spo.report.win_rate import WinRate, win_rate

HERE = Path(__file__).parent
FIRST_SEED = 1000  # the judge's seeds start here; nothing else of the demonstration uses them


@dataclass(frozen=True)
class Judgement:
    """taste [N] the rule's value of each picture; recognised [N] bool, whether the classifier assigns it to its
    prompt."""

    taste: Tensor
    recognised: Tensor

    @property
    def recognised_share(self) -> float:
        return float(self.recognised.float().mean())


class Judge:
    """Judges finished pictures [N, 3, 64, 64] in [-1, 1] of N prompts that are subjects of the demo."""

    def __init__(self) -> None:
        self.classifier = load_classifier(HERE / "subject_classifier.safetensors")

    def judge(self, pixels: Tensor, prompts: Sequence[str]) -> Judgement:
        wanted = torch.tensor([self.classifier.classes.index(prompt) for prompt in prompts])
        return Judgement(colourfulness(pixels), self.classifier.assign(pixels) == wanted)


def held_out(pairs: int = 64) -> tuple[list[str], list[int]]:
    """(prompts, seeds) of the held-out pairs: prompts that training never sees, in turn, each pair its own seed."""
    prompts = (HERE / "prompts_heldout.txt").read_text(encoding="utf-8").splitlines()
    return [prompts[i % len(prompts)] for i in range(pairs)], [FIRST_SEED + i for i in range(pairs)]


def taste_win_rate(lora: Judgement, base: Judgement) -> WinRate:
    """How often the LoRA's picture has more of the rule's taste than the base's of the same prompt and seed."""
    return win_rate(lora.taste.tolist(), base.taste.tolist())
