"""Prompts to conditioning, against diffusers' pipelines and the WebUI's chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.algorithm.denoiser import Conditioning
from spo.errors import SpoError
from spo.headless import text
from spo.headless.model import DiffusersModel
from spo.headless.text import EncodedPrompts, count_chunks, split_tokens
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
    conditioning = sdxl.text_encoders.encode(PROMPTS, **SIZE)
    assert torch.equal(conditioning.cross_attention, features)
    assert conditioning.pooled is not None and torch.equal(conditioning.pooled, pooled)
    zeros = sdxl.text_encoders.encode([""] * 3, negative=True, **SIZE)
    assert torch.equal(zeros.cross_attention, negative)
    assert zeros.pooled is not None and torch.equal(zeros.pooled, negative_pooled)


def test_clip_skip_is_the_named_layer_and_the_final_norm(sd15: DiffusersModel) -> None:
    network = sd15.text_encoders.networks[0]
    tower = getattr(network, "text_model", network)
    seen: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    for clip_skip in (1, 2, 3):
        handle = tower.encoder.layers[-clip_skip].register_forward_hook(note)
        features = sd15.text_encoders.encode(PROMPTS, clip_skip=clip_skip, **SIZE).cross_attention
        handle.remove()
        assert torch.equal(features, tower.final_layer_norm(seen.pop()))
    for wrong in (0, 4):
        with pytest.raises(SpoError, match=rf"clip skip {wrong} \(accepted: 1 to 3\)"):
            sd15.text_encoders.encode(PROMPTS, clip_skip=wrong, **SIZE)


def test_clip_skip_leaves_sdxl_alone(sdxl: DiffusersModel) -> None:
    features = sdxl.text_encoders.encode(PROMPTS, clip_skip=2, **SIZE).cross_attention
    assert torch.equal(features, sdxl.text_encoders.encode(PROMPTS, **SIZE).cross_attention)


def test_an_empty_prompt_is_zeroed_only_as_a_negative_of_sdxl(sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    negative = sdxl.text_encoders.encode(["", "ugly"], negative=True, **SIZE)
    positive = sdxl.text_encoders.encode(["", "ugly"], **SIZE)
    assert negative.pooled is not None and positive.pooled is not None
    assert not negative.cross_attention[0].any() and not negative.pooled[0].any()
    assert positive.cross_attention[0].any() and positive.pooled[0].any()
    assert torch.equal(negative.cross_attention[1], positive.cross_attention[1])
    assert torch.equal(negative.pooled[1], positive.pooled[1])
    assert sd15.text_encoders.encode([""], negative=True, **SIZE).cross_attention.any()


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
        chunks = count_chunks([LONG, "short"])
        assert chunks == 3 and count_chunks(["short"]) == count_chunks([]) == 1
        both = model.text_encoders.encode([LONG, "short"], **SIZE)
        assert both.cross_attention.shape[:2] == (2, 77 * 3)
        short = model.text_encoders.encode(["short"], **SIZE)
        empty = model.text_encoders.encode([""], **SIZE)
        expected = torch.cat([short.cross_attention, *[empty.cross_attention] * 2], dim=1)
        assert torch.allclose(both.cross_attention[1:], expected, atol=1e-5)
        padded = model.text_encoders.encode(["short"], chunks=3, **SIZE)
        assert torch.allclose(padded.cross_attention, expected, atol=1e-5)
        with pytest.raises(SpoError, match="need 3 chunks of 75 tokens, not 2"):
            model.text_encoders.encode([LONG], chunks=2, **SIZE)
        x, timesteps, _ = inputs(model, 2)
        assert torch.isfinite(model.predict(x, timesteps, both)).all()


def test_each_chunk_is_encoded_by_itself(sdxl: DiffusersModel) -> None:
    first, second = "apple " * 75, "castle " * 10
    both = sdxl.text_encoders.encode([first + second], **SIZE)
    parts = [sdxl.text_encoders.encode([part], **SIZE) for part in (first, second)]
    assert torch.allclose(both.cross_attention, torch.cat([part.cross_attention for part in parts], dim=1), atol=1e-5)
    assert both.pooled is not None and parts[0].pooled is not None
    assert torch.allclose(both.pooled, parts[0].pooled, atol=1e-5)


def test_many_prompts_are_encoded_in_batches(sdxl: DiffusersModel) -> None:
    prompts = [f"picture number {number}" for number in range(35)]
    many = sdxl.text_encoders.encode(prompts, **SIZE)
    one = sdxl.text_encoders.encode(prompts[33:34], **SIZE)
    assert len(many) == 35 and many.pooled is not None and one.pooled is not None
    assert torch.allclose(many.cross_attention[33], one.cross_attention[0], atol=1e-5)
    assert torch.allclose(many.pooled[33], one.pooled[0], atol=1e-5)


def test_wrong_prompts(sd15: DiffusersModel) -> None:
    with pytest.raises(TypeError, match="one string"):
        sd15.text_encoders.encode("a cat", **SIZE)
    with pytest.raises(SpoError, match="no prompts"):
        sd15.text_encoders.encode([], **SIZE)


def test_encoders_rest_and_come_back(sd15_path: Path) -> None:
    model = load(sd15_path)
    bare = model.memory_bytes()
    first = model.text_encoders.encode(PROMPTS, **SIZE).cross_attention
    text_bytes = model.text_encoders.memory_bytes()
    assert model.memory_bytes() == bare + text_bytes > bare
    model.rest_text_encoders(keep=True)
    assert model.memory_bytes() == bare + text_bytes
    model.rest_text_encoders(keep=False)
    assert model.memory_bytes() == bare
    assert torch.equal(model.text_encoders.encode(PROMPTS, **SIZE).cross_attention, first)


def test_memory_that_runs_out_halves_the_portion(sdxl: DiffusersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = sdxl.text_encoders
    expected = encoders.encode(PROMPTS, **SIZE)
    run, sizes = encoders._run, []

    def scarce(network: Any, rows: Any, *rest: Any) -> Any:
        sizes.append(min(len(rows), encoders.chunk_rows))
        if sizes[-1] > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")
        return run(network, rows, *rest)

    monkeypatch.setattr(encoders, "_run", scarce)
    monkeypatch.setattr(encoders, "chunk_rows", 4)
    with pytest.warns(UserWarning, match="going on with 1 prompts at a time"):
        conditioning = encoders.encode(PROMPTS, **SIZE)
    assert sizes == [3, 2, 1, 1, 1, 1, 1, 1]
    assert torch.allclose(conditioning.cross_attention, expected.cross_attention, atol=1e-6)
    monkeypatch.setattr(encoders, "_run", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(SpoError, match="Out of memory.*take device cpu"):
        encoders.encode(PROMPTS, **SIZE)


# ---- encoded prompts at rest


def test_encoded_prompts_are_filled_up_with_empty_chunks(sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    for model in (sd15, sdxl):
        prompts = ["short", LONG, "a cat"]
        store, portions = EncodedPrompts(), []

        def encode(texts: Any, model: DiffusersModel = model, portions: list[Any] = portions) -> Conditioning:
            portions.append(list(texts))
            return model.text_encoders.encode(texts, **SIZE)

        store.fill(prompts, encode, 3)
        assert portions == [prompts, [""]] and "short" in store and "other" not in store
        assert [len(store._rows[prompt].cross_attention[0]) for prompt in prompts] == [77, 231, 77]
        rows = store.take(["a cat", LONG], torch.device("cpu"))
        expected = model.text_encoders.encode(["a cat", LONG], chunks=3, **SIZE)
        assert torch.allclose(rows.cross_attention, expected.cross_attention, atol=1e-5)
        if expected.pooled is not None and expected.size_ids is not None:
            assert rows.pooled is not None and torch.allclose(rows.pooled, expected.pooled, atol=1e-5)
            assert rows.size_ids is not None and torch.equal(rows.size_ids, expected.size_ids)
        store.fill(["a cat", "a dog"], encode, 1)
        assert portions[2:] == [["a dog"]] and "short" not in store
        assert store.take(["a dog", "a cat"], torch.device("cpu")).cross_attention.shape[1] == 77


def test_a_row_holds_nothing_but_itself(sdxl: DiffusersModel) -> None:
    """4,000 prompts of SDXL take 1.3 GB in float16, not the 30 GB of every layer's output."""
    store = EncodedPrompts()
    store.fill(["a", "b"], lambda texts: sdxl.text_encoders.encode(texts, **SIZE), 1)
    for row in store._rows.values():
        assert row.cross_attention.untyped_storage().nbytes() == 77 * 64 * 4
        assert row.cross_attention.device.type == "cpu"


def test_many_prompts_come_in_portions(sd15: DiffusersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PROMPTS_AT_A_TIME", 2)
    sizes: list[int] = []

    def encode(texts: Any) -> Conditioning:
        sizes.append(len(texts))
        return sd15.text_encoders.encode(texts, **SIZE)

    EncodedPrompts().fill(["a", "b", "c", "a"], encode, 1)
    assert sizes == [2, 1]
