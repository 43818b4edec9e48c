"""The Compare tab: prompts x LoRA files or stages x weights, with scores."""

from __future__ import annotations


def build() -> None:
    """Filled below."""
