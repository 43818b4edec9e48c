"""Prompts as the fork reads them."""

from __future__ import annotations

from collections.abc import Iterable

from spo.errors import SpoError
from spo.webui import forked
from spo.webui.a1111 import prompts as a1111_prompts
from spo.webui.a1111.checkpoint import Checkpoint
from spo.webui.a1111.prompts import EncodedPrompts


def activate_networks(prompt: str) -> None:
    """As `a1111.activate_networks`."""
    from modules import sd_models

    forked.activate_networks(prompt, sd_models.model_data.sd_model)


def encode_prompts(
    checkpoint: Checkpoint, prompts: Iterable[str], negative_prompt: str, steps: int, width: int, height: int
) -> EncodedPrompts:
    """As `a1111.encode_prompts`. SpoError when prompts differ in the weights of their parts with AND.

    The fork samples as many parts of each prompt of a batch as the shortest has, by the weights of the last.
    """
    encoded = a1111_prompts.encode_prompts(checkpoint, prompts, negative_prompt, steps, width, height)
    parts = {prompt: [part.weight for part in parts] for prompt, parts in encoded.positive.items()}
    first = next(iter(parts))
    for prompt, weights in parts.items():
        if weights != parts[first]:
            raise SpoError(
                f'"{first}" and "{prompt}" differ in their parts with AND or in the weights of these, which this WebUI '
                "cannot sample in one batch; write all training prompts alike."
            )
    return encoded
