"""Prompts to conditioning, against diffusers' pipelines and the WebUI's chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.errors import SpoError
from spo.headless.model import DiffusersModel
from spo.headless.text import split_tokens
from tests.headless_models import LONG, PROMPTS, SIZE, inputs, load
from tests.tiny_checkpoints import (
    tiny_sdxl,
    tokenizer_folder,
)


def test_sdxl_prompts_against_diffusers(sdxl: DiffusersModel) -> None:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    source = tiny_sdxl()
    pipeline = StableDiffusionXLPipeline(
        vae=source.vae, text_encoder=source.text_encoders[0], text_encoder_2=source.text_encoders[1],
        tokenizer=CLIPTokenizer.from_pretrained(str(tokenizer_folder())),
        tokenizer_2=CLIPTokenizer.from_pretrained(str(tokenizer_folder()), pad_token="!"),  # as in SDXL's own folder
        unet=source.unet, scheduler=None, add_watermarker=False,
    )  # fmt: skip
    features, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    conditioning = sdxl.encode_prompts(PROMPTS, **SIZE)
    assert torch.equal(conditioning.cross_attention, features)
    assert conditioning.pooled is not None and torch.equal(conditioning.pooled, pooled)
    zeros = sdxl.encode_prompts([""] * 3, negative=True, **SIZE)
    assert torch.equal(zeros.cross_attention, negative)
    assert zeros.pooled is not None and torch.equal(zeros.pooled, negative_pooled)


def test_clip_skip_is_the_named_layer_and_the_final_norm(sd15: DiffusersModel) -> None:
    text = getattr(sd15._text_encoders[0], "text_model", sd15._text_encoders[0])
    seen: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    for clip_skip in (1, 2, 3):
        handle = text.encoder.layers[-clip_skip].register_forward_hook(note)
        features = sd15.encode_prompts(PROMPTS, clip_skip=clip_skip, **SIZE).cross_attention
        handle.remove()
        assert torch.equal(features, text.final_layer_norm(seen.pop()))
    for wrong in (0, 4):
        with pytest.raises(SpoError, match=rf"clip skip {wrong} \(accepted: 1 to 3\)"):
            sd15.encode_prompts(PROMPTS, clip_skip=wrong, **SIZE)


def test_clip_skip_leaves_sdxl_alone(sdxl: DiffusersModel) -> None:
    features = sdxl.encode_prompts(PROMPTS, clip_skip=2, **SIZE).cross_attention
    assert torch.equal(features, sdxl.encode_prompts(PROMPTS, **SIZE).cross_attention)


def test_an_empty_prompt_is_zeroed_only_as_a_negative_of_sdxl(sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    negative = sdxl.encode_prompts(["", "ugly"], negative=True, **SIZE)
    positive = sdxl.encode_prompts(["", "ugly"], **SIZE)
    assert negative.pooled is not None and positive.pooled is not None
    assert not negative.cross_attention[0].any() and not negative.pooled[0].any()
    assert positive.cross_attention[0].any() and positive.pooled[0].any()
    assert torch.equal(negative.cross_attention[1], positive.cross_attention[1])
    assert torch.equal(negative.pooled[1], positive.pooled[1])
    assert sd15.encode_prompts([""], negative=True, **SIZE).cross_attention.any()


COMMA, WORD = 267, 320


def test_split_tokens() -> None:
    words = [WORD] * 200
    assert split_tokens([], COMMA) == [[]]
    assert [len(chunk) for chunk in split_tokens(words[:75], COMMA)] == [75]
    assert [len(chunk) for chunk in split_tokens(words[:76], COMMA)] == [75, 1]
    assert [len(chunk) for chunk in split_tokens(words[:151], COMMA)] == [75, 75, 1]
    for after in (0, 1, 19, 20):  # words between the last comma and the end of the chunk
        tokens = [*words[: 74 - after], COMMA, *words[:after], *words[:5]]
        carried = after if after < 20 else 0
        chunks = split_tokens(tokens, COMMA)
        assert [len(chunk) for chunk in chunks] == [75 - carried, 5 + carried]
        assert [token for chunk in chunks for token in chunk] == tokens
    tokens = [*words[:60], COMMA, *words[:14], COMMA, WORD]  # a comma may itself begin the next chunk
    assert [len(chunk) for chunk in split_tokens(tokens, COMMA)] == [75, 2]


def webui_tokenize_line(tokens: list[int]) -> list[list[int]]:
    """The rule of WebUI 1.10.1's `tokenize_line`, retold as a state machine: the oracle for `_split_tokens`."""
    chunks: list[list[int]] = []
    chunk: list[int] = []
    last_comma = -1
    for token in tokens:
        if token == COMMA:
            last_comma = len(chunk)
        elif len(chunk) == 75 and last_comma != -1 and len(chunk) - last_comma <= 20:
            chunks.append(chunk[: last_comma + 1])
            chunk, last_comma = chunk[last_comma + 1 :], -1
        if len(chunk) == 75:
            chunks.append(chunk)
            chunk, last_comma = [], -1
        chunk.append(token)
    return [*chunks, chunk] if chunk or not chunks else chunks


def test_split_tokens_as_the_webui() -> None:
    generator = torch.Generator().manual_seed(0)
    for comma_every in (3, 15, 40, 90):
        for _ in range(60):
            length = int(torch.randint(0, 400, (), generator=generator))
            is_comma = torch.randint(0, comma_every, (length,), generator=generator) == 0
            tokens = [COMMA if comma else WORD for comma in is_comma.tolist()]
            assert split_tokens(tokens, COMMA) == webui_tokenize_line(tokens)


def test_long_prompts(sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    for model in (sd15, sdxl):
        chunks = model.count_chunks([LONG, "short"])
        assert chunks == 3 and model.count_chunks(["short"]) == model.count_chunks([]) == 1
        both = model.encode_prompts([LONG, "short"], **SIZE)
        assert both.cross_attention.shape[:2] == (2, 77 * 3)
        short = model.encode_prompts(["short"], **SIZE)
        empty = model.encode_prompts([""], **SIZE)
        expected = torch.cat([short.cross_attention, *[empty.cross_attention] * 2], dim=1)
        assert torch.allclose(both.cross_attention[1:], expected, atol=1e-5)
        padded = model.encode_prompts(["short"], chunks=3, **SIZE)
        assert torch.allclose(padded.cross_attention, expected, atol=1e-5)
        with pytest.raises(SpoError, match="need 3 chunks of 75 tokens, not 2"):
            model.encode_prompts([LONG], chunks=2, **SIZE)
        x, timesteps, _ = inputs(model, 2)
        assert torch.isfinite(model.predict(x, timesteps, both)).all()


def test_each_chunk_is_encoded_by_itself(sdxl: DiffusersModel) -> None:
    first, second = "apple " * 75, "castle " * 10
    both = sdxl.encode_prompts([first + second], **SIZE)
    parts = [sdxl.encode_prompts([part], **SIZE) for part in (first, second)]
    assert torch.allclose(both.cross_attention, torch.cat([part.cross_attention for part in parts], dim=1), atol=1e-5)
    assert both.pooled is not None and parts[0].pooled is not None
    assert torch.allclose(both.pooled, parts[0].pooled, atol=1e-5)


def test_many_prompts_are_encoded_in_batches(sdxl: DiffusersModel) -> None:
    prompts = [f"picture number {number}" for number in range(35)]
    many = sdxl.encode_prompts(prompts, **SIZE)
    one = sdxl.encode_prompts(prompts[33:34], **SIZE)
    assert len(many) == 35 and many.pooled is not None and one.pooled is not None
    assert torch.allclose(many.cross_attention[33], one.cross_attention[0], atol=1e-5)
    assert torch.allclose(many.pooled[33], one.pooled[0], atol=1e-5)


def test_wrong_prompts_and_freed_encoders(sd15_path: Path) -> None:
    model = load(sd15_path)
    with pytest.raises(TypeError, match="one string"):
        model.encode_prompts("a cat", **SIZE)
    with pytest.raises(SpoError, match="no prompts"):
        model.encode_prompts([], **SIZE)
    before = model.memory_bytes()
    text_bytes = sum(p.numel() * 4 for p in model._text_encoders[0].parameters())
    model.free_text_encoders()
    assert before - model.memory_bytes() == pytest.approx(text_bytes, rel=0.01)
    with pytest.raises(SpoError, match="text encoders were freed"):
        model.encode_prompts(PROMPTS, **SIZE)
