"""Captions of the pictures, drawn with their latents."""

from __future__ import annotations

import numpy as np
import torch

from recipes.demo_checkpoint.networks import tokenize
from recipes.demo_checkpoint.options import Options
from recipes.demo_checkpoint.pictures import STYLES, VARIANTS, load_subjects


class CaptionedLatents:
    """Draws training examples: a picture's variant and one of its captions.

    Half of the captions name the style; the prompt name comes 60 % of the time, the other wordings share the rest;
    10 % of the captions are empty, for classifier-free guidance.
    """

    def __init__(self, options: Options, rows: list[int]):
        subjects = load_subjects(options.work)
        self.rows = rows
        self.latents = torch.load(options.work / "latents.pt")
        self.wordings = {row: subjects[row]["wordings"] for row in self.rows}
        texts = [
            *sorted(
                {
                    text + tag
                    for row in self.rows
                    for text in self.wordings[row]
                    for tag in ("", *(f", {style}" for style in STYLES))
                }
            ),
            "",
        ]
        self.index = {text: i for i, text in enumerate(texts)}
        self.tokens = tokenize(options.tokenizer, texts)

    def caption(self, row: int, style: str, rng: np.random.Generator) -> str:
        if rng.random() < 0.1:
            return ""
        wordings = self.wordings[row]
        wording = wordings[0] if rng.random() < 0.6 else wordings[rng.integers(len(wordings))]
        return wording + (f", {style}" if rng.random() < 0.5 else "")

    def draw(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [count, 4, 8, 8] and tokens [count, 77]."""
        rows = rng.choice(self.rows, count)
        styles = rng.integers(len(STYLES), size=count)
        latents = self.latents[rows, styles, rng.integers(VARIANTS, size=count)].float()
        captions = [self.index[self.caption(row, STYLES[style], rng)] for row, style in zip(rows, styles, strict=True)]
        return latents, self.tokens[captions]
