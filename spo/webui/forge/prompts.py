"""Prompts as the WebUI reads them; what comes of them is ordinary tensors, though Forge encodes in inference mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spo.webui import a1111, forked
from spo.webui.a1111 import EncodedPrompts
from spo.webui.a1111.prompts import encode_by_model
from spo.webui.forge.checkpoint import Checkpoint, loaded_model
from spo.webui.forked import ordinary


def activate_networks(prompt: str) -> None:
    """As `a1111.activate_networks`."""
    forked.activate_networks(prompt, loaded_model())


def encode_prompts(
    checkpoint: Checkpoint, prompts: Iterable[str], negative_prompt: str, steps: int, width: int, height: int
) -> EncodedPrompts:
    """All prompts through the text encoders, for `steps` steps; the active networks count. width, height in pixels."""
    checkpoint.model.set_clip_skip(a1111.clip_skip())
    encoded = encode_by_model(checkpoint, prompts, negative_prompt, steps, width, height)
    positive = {prompt: [_ordinary_part(part) for part in parts] for prompt, parts in encoded.positive.items()}
    return EncodedPrompts(positive, _ordinary_schedule(encoded.negative))


def _ordinary_part(part: Any) -> Any:
    return type(part)(_ordinary_schedule(part.schedules), part.weight)


def _ordinary_schedule(schedule: list[Any]) -> list[Any]:
    return [entry._replace(cond=ordinary(entry.cond)) for entry in schedule]
