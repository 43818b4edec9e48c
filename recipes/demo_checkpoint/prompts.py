"""Stages "prompts" and "sheet": training and held-out prompts by a fixed procedure, and contact sheets."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from recipes.demo_checkpoint.options import Options
from recipes.demo_checkpoint.pictures import CHOICE, SIZE_PX
from recipes.demo_checkpoint.sampling import Sampler
from spo.demo.rule import colourfulness
from spo.demo.subjects import load

NO_PROMPT = re.compile("|".join(CHOICE["no_prompt"]))
TRAINING_PROMPTS, HELD_OUT_PROMPTS, SELECTION_SEEDS = 300, 32, (0, 1, 2)
SLIGHTLY_COLOURFUL = 15.0  # Hasler and Suesstrunk 2003, table 2: what their viewers called so; 0 is "not colourful"


def choose_prompts(options: Options) -> None:
    """prompts.txt and prompts_heldout.txt, disjoint, by a fixed procedure.

    Candidates are the core subjects that make a prompt. Each is sampled with SELECTION_SEEDS (judging uses seeds from
    1000 on). The taste has to have something to say of it: one whose pictures are less than SLIGHTLY_COLOURFUL in the
    mean, as a tooth is, is none. The others are scored by the share of pictures that the classifier assigns to them.
    The best TRAINING_PROMPTS + HELD_OUT_PROMPTS, in the order of the share (ties in the candidates' order), are chosen.
    Of those with the full share (of the first 2 x HELD_OUT_PROMPTS, where fewer have it), every n-th is held out.
    """

    classifier = load(options.out / "subject_classifier.safetensors")
    subjects = [name for name in classifier.classes if not NO_PROMPT.search(name)]
    pixels = Sampler(options).of_each(subjects, SELECTION_SEEDS)
    wanted = torch.tensor([classifier.classes.index(name) for name in subjects])
    right = classifier.assign(pixels.flatten(0, 1)).view(pixels.shape[:2]) == wanted[:, None]
    colours = colourfulness(pixels.flatten(0, 1)).view(pixels.shape[:2])
    share = dict(zip(subjects, right.float().mean(1).tolist(), strict=True))
    colour = dict(zip(subjects, colours.mean(1).tolist(), strict=True))
    candidates = [name for name in subjects if colour[name] >= SLIGHTLY_COLOURFUL]
    chosen = sorted(candidates, key=lambda name: -share[name])[: TRAINING_PROMPTS + HELD_OUT_PROMPTS]
    full = sum(share[name] == 1.0 for name in candidates)
    sure = chosen[: max(full, 2 * HELD_OUT_PROMPTS)]
    held_out = [sure[i * len(sure) // HELD_OUT_PROMPTS] for i in range(HELD_OUT_PROMPTS)]
    training = [name for name in chosen if name not in held_out]
    (options.out / "prompts.txt").write_text("\n".join(training) + "\n")
    (options.out / "prompts_heldout.txt").write_text("\n".join(held_out) + "\n")
    parts = {"subjects": subjects, "candidates": candidates, "training": training, "held-out": held_out}
    for kind, names in parts.items():
        print(f"{len(names)} {kind}: {np.mean([share[name] for name in names]):.3f} of the samples assigned right")


def draw_sheet(options: Options) -> None:
    """contact_sheet.png: the checked prompts, then held-out ones, four pictures each (seeds 1000 to 1003)."""
    held_out = (options.out / "prompts_heldout.txt").read_text().splitlines()
    prompts = [*CHOICE["checked_prompts"], "red apple, flat", "red apple, 3d", *held_out]
    draw_captioned(options.out / "contact_sheet.png", prompts, Sampler(options).of_each(prompts, range(1000, 1004)))


def draw_captioned(path: Path, captions: list[str], pixels: torch.Tensor) -> None:
    """Save pictures [prompts, seeds, 3, 64, 64] as a sheet with four captioned prompts in a row."""

    count, seeds = pixels.shape[:2]
    cell_px, row_px = seeds * SIZE_PX + 8, SIZE_PX + 18
    sheet = Image.new("RGB", (4 * cell_px, math.ceil(count / 4) * row_px), "white")
    draw = ImageDraw.Draw(sheet)
    bytes_ = ((pixels + 1) * 127.5).round().byte().permute(0, 3, 1, 4, 2).flatten(2, 3).numpy()
    for i, caption in enumerate(captions):
        left, top = i % 4 * cell_px, i // 4 * row_px
        draw.text((left + 2, top + 2), caption, fill="black")
        sheet.paste(Image.fromarray(bytes_[i]), (left, top + 14))
    sheet.save(path, optimize=True)
