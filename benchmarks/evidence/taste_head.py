"""A taste head that knows what the demo's preference model knows: fitted to the rule's verdicts on the same groups."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file

from recipes.demo_checkpoint.make_preference import GROUP, labelled
from spo.demo.run import CHECKPOINT, demo_config
from spo.headless.host import load_host
from spo.preference.taste.fit import VoteSet, fit_taste
from spo.preference.taste.head import save_taste
from spo.prompts import read_prompts


def make(work: Path) -> None:
    """FOLDER/taste.safetensors, from FOLDER/groups.safetensors (`make_preference --groups-file`)."""
    torch.set_num_threads(1)
    config = demo_config(work)
    clean = load_file(work / "groups.safetensors")["fitted"]
    with torch.no_grad():
        groups = labelled(load_host(config), clean, read_prompts(config.prompt.prompts), "colourfulness")
    fitted = fit_taste(votes_of(groups.clean, groups.taste), name="taste")
    save_taste(fitted.head, work / "taste.safetensors")
    print(f"right on {fitted.head.facts.held_out_accuracy:.1%} of the verdicts that it was not fitted to")


def votes_of(clean: torch.Tensor, taste: torch.Tensor) -> VoteSet:
    """Every pair of every group [G, GROUP, 4, h, w] as a vote for the one of more taste [G, GROUP]."""
    first, second = zip(*itertools.combinations(range(GROUP), 2), strict=True)
    pairs = torch.stack([clean[:, list(first)], clean[:, list(second)]], 2)  # [G, pairs, 2, 4, h, w]
    answers = (taste[:, list(first)] > taste[:, list(second)]).float()
    groups = tuple(torch.arange(len(clean)).repeat_interleave(len(first)).tolist())
    ids = tuple(str(number) for number in range(len(groups)))
    return VoteSet(pairs.flatten(0, 1), answers.flatten(), ids, "sd15", CHECKPOINT.stem, "", groups=groups)
