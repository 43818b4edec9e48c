"""Prompts with AND, of which a fork samples a batch by the last one's weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from spo.errors import SpoError
from spo.webui.a1111 import EncodedPrompts
from spo.webui.reforge import prompts


@pytest.mark.parametrize(
    ("weights", "refused"),
    [
        ({"a": [1.0], "b": [1.0]}, False),
        ({"a AND b :0.5": [1.0, 0.5], "c AND d :0.5": [1.0, 0.5]}, False),
        ({"a": [1.0], "b AND c": [1.0, 1.0]}, True),
        ({"a AND b": [1.0, 1.0], "c AND d :0.5": [1.0, 0.5]}, True),
    ],
)
def test_prompts_that_differ_in_their_parts_are_refused(monkeypatch, weights, refused):
    encoded = EncodedPrompts(
        {prompt: [SimpleNamespace(weight=weight) for weight in parts] for prompt, parts in weights.items()}, None
    )
    monkeypatch.setattr(prompts.a1111_prompts, "encode_prompts", lambda *_: encoded)
    if refused:
        with pytest.raises(SpoError, match="differ in their parts with AND"):
            prompts.encode_prompts(None, list(weights), "", 4, 64, 64)
    else:
        assert prompts.encode_prompts(None, list(weights), "", 4, 64, 64) is encoded
