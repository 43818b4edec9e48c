"""Prompts as the text encoders read them: chunks of token ids.

Prompts follow the WebUI, but emphasis, BREAK, prompt editing and embeddings are WebUI syntax that is not interpreted
here: parentheses are text. An empty negative prompt of SDXL is zeroed row by row; the WebUI does so when all rows of a
batch are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 75  # of a prompt; with the start and end tokens a chunk is 77 places long
COMMA_BACKTRACK_TOKENS = 20  # the WebUI's default for "Prompt word wrap length limit"


@cache
def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(Path(__file__).parents[1] / "clip_tokenizer"))


def prompt_chunks(prompts: Sequence[str]) -> list[list[list[int]]]:
    """Per prompt its chunks, at least one, of at most 75 token ids each, without start and end tokens."""
    if not prompts:
        return []
    words = tokenizer()
    ids = words(list(prompts), truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
    comma = words.convert_tokens_to_ids(",</w>")
    return [split_tokens(tokens, comma) for tokens in ids]


def split_tokens(tokens: Sequence[int], comma: int) -> list[list[int]]:
    """Chunks of 75 tokens; one that is full carries what stands after a comma, if it is 20 tokens or fewer, over."""
    chunks: list[list[int]] = []
    chunk: list[int] = []
    for token in tokens:
        if len(chunk) == CHUNK_TOKENS:
            after_comma = 0
            if token != comma and comma in chunk:
                after_comma = chunk[::-1].index(comma)
            carried = after_comma if after_comma < COMMA_BACKTRACK_TOKENS else 0
            chunks.append(chunk[: CHUNK_TOKENS - carried])
            chunk = chunk[CHUNK_TOKENS - carried :]
        chunk.append(token)
    return [*chunks, chunk] if chunk or not chunks else chunks


def by_prompt(outputs: Sequence[Tensor], prompts: int) -> Tensor:
    """Batches of [chunks, 77, D] -> [prompts, 77 * chunks, D]."""
    return torch.cat(list(outputs)).unflatten(0, (prompts, -1)).flatten(1, 2)
