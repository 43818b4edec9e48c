"""The headless host against the networks that the tiny checkpoints were made of, and against diffusers' pipelines."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.algorithm.denoiser import Conditioning
from spo.checkpoint.single_file import inspect_checkpoint
from spo.errors import SpoError
from spo.headless.model import DiffusersModel, _split_tokens, load_model
from tests.tiny_checkpoints import (
    TinySource,
    tiny_sd15,
    tiny_sdxl,
    tokenizer_folder,
    write_diffusers_folder,
    write_tiny_sd15,
    write_tiny_sdxl,
    write_vae,
)

PROMPTS = ["a photo of a red apple", "", "castle on a hill, (oil painting:1.2), sunset"]
SIZE = {"width": 64, "height": 96}
LONG = ", ".join(["a very detailed picture of an old castle on a green hill"] * 12)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a test tried to reach the network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load(path: Path, **options: Any) -> DiffusersModel:
    return load_model(path, **({"device": "cpu", "dtype": torch.float32} | options))


@pytest.fixture(scope="module")
def sd15_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd15(tmp_path_factory.mktemp("a") / "tiny.safetensors")


@pytest.fixture(scope="module")
def sdxl_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("b") / "tiny-xl.safetensors")


@pytest.fixture(scope="module")
def sd15(sd15_path: Path) -> DiffusersModel:
    return load(sd15_path)


@pytest.fixture(scope="module")
def sdxl(sdxl_path: Path) -> DiffusersModel:
    return load(sdxl_path)


def inputs(model: DiffusersModel, count: int = 3) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, 12, 8, generator=generator)
    return x, torch.tensor([999, 501, 0])[:count], model.encode_prompts(PROMPTS[:count], **SIZE)


def assert_same_weights(model: DiffusersModel, source: TinySource) -> None:
    for mine, theirs in zip(
        (model.unet, model.vae, *model._text_encoders), (source.unet, source.vae, *source.text_encoders), strict=True
    ):
        got, expected = mine.state_dict(), theirs.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


# ---- weights and outputs equal those of the source networks


def test_sd15_equals_its_source(sd15: DiffusersModel) -> None:
    source = tiny_sd15()
    assert (sd15.architecture, sd15.prediction_type, sd15.latent_downscale) == ("sd15", "epsilon", 8)
    assert_same_weights(sd15, source)
    x, timesteps, conditioning = inputs(sd15)
    expected = source.unet(x, timesteps, conditioning.cross_attention).sample
    assert torch.equal(sd15.predict(x, timesteps, conditioning), expected)
    pictures = source.vae.decode(x / 0.18215).sample.clamp(-1, 1)
    assert torch.equal(sd15.decode(x), pictures) and pictures.std() > 0.1
    assert conditioning.pooled is None and conditioning.size_ids is None


def test_sdxl_equals_its_source(sdxl: DiffusersModel) -> None:
    source = tiny_sdxl()
    assert_same_weights(sdxl, source)
    x, timesteps, conditioning = inputs(sdxl)
    assert conditioning.size_ids is not None
    assert conditioning.size_ids.tolist() == [[96.0, 64.0, 0.0, 0.0, 96.0, 64.0]] * 3
    added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.size_ids}
    expected = source.unet(x, timesteps, conditioning.cross_attention, added_cond_kwargs=added).sample
    assert torch.equal(sdxl.predict(x, timesteps, conditioning), expected)
    assert torch.equal(sdxl.decode(x), source.vae.decode(x / 0.13025).sample.clamp(-1, 1))


def test_outputs_depend_on_every_condition(sdxl: DiffusersModel) -> None:
    x, timesteps, c = inputs(sdxl)
    assert c.pooled is not None and c.size_ids is not None
    outputs = [
        sdxl.predict(x, timesteps, changed)
        for changed in (
            c,
            Conditioning(c.cross_attention.flip(0), c.pooled, c.size_ids),
            Conditioning(c.cross_attention, c.pooled.flip(0), c.size_ids),
            Conditioning(c.cross_attention, c.pooled, c.size_ids + 512),
        )
    ]
    assert all((outputs[0] - other).abs().max() > 1e-4 for other in outputs[1:])
    with pytest.raises(SpoError, match="needs pooled text features"):
        sdxl.predict(x, timesteps, Conditioning(c.cross_attention))


def test_networks_are_frozen_and_eval(sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    for model in (sd15, sdxl):
        for network in (model.unet, model.vae, *model._text_encoders):
            assert not network.training and not any(p.requires_grad for p in network.parameters())
            assert not any(t.is_meta for t in (*network.parameters(), *network.buffers()))


def test_gradient_reaches_the_latent_and_stops_nowhere(sd15: DiffusersModel) -> None:
    x, timesteps, conditioning = inputs(sd15)
    assert not conditioning.cross_attention.requires_grad and not conditioning.cross_attention.is_inference()
    sd15.predict(x.requires_grad_(), timesteps, conditioning).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with torch.no_grad():
        assert not sd15.predict(x, timesteps, conditioning).requires_grad


def test_timesteps_may_be_one_number_or_fractions(sd15: DiffusersModel) -> None:
    x, _, conditioning = inputs(sd15)
    one = sd15.predict(x, torch.tensor(500), conditioning)
    assert torch.equal(one, sd15.predict(x, torch.tensor([500, 500, 500]), conditioning))
    assert not torch.equal(one, sd15.predict(x, torch.tensor([500.5] * 3), conditioning))


def test_low_precision_networks_keep_the_callers_dtype(sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    for full in (sd15, sdxl):
        model = load(full.info.path, dtype=torch.bfloat16)
        assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
        x, timesteps, conditioning = inputs(model)
        assert conditioning.cross_attention.dtype == torch.bfloat16
        assert conditioning.size_ids is None or conditioning.size_ids.dtype == torch.float32
        output, expected = model.predict(x, timesteps, conditioning), full.predict(*inputs(full))
        assert output.dtype == torch.float32 and model.decode(x.bfloat16()).dtype == torch.float32
        assert (output - expected).abs().mean() < 0.05 * expected.abs().mean()
        assert model.memory_bytes() < full.memory_bytes()


@pytest.mark.parametrize(
    "kind", ["pickle", "folder", "fp16 folder", "sharded folder", "old names", "other sizes", "float32"]
)
def test_other_ways_to_the_same_sd15(tmp_path: Path, kind: str) -> None:
    source = tiny_sd15()
    if kind == "pickle":
        path = write_tiny_sd15(tmp_path / "tiny.ckpt")
    elif kind == "float32":
        path = write_tiny_sd15(tmp_path / "tiny.safetensors", dtype=torch.float32)
    elif kind == "old names":  # as merges made by early diffusers scripts, which the WebUI also reads
        tensors = load_file(write_tiny_sd15(tmp_path / "new.safetensors"))
        path = tmp_path / "old.safetensors"
        save_file({name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}, path)
    elif kind == "other sizes":
        sizes: dict[str, Any] = {"channels": (64, 96), "depths": (1, 2), "res_blocks": 2, "heads": 8, "linear": True,
                                 "text_width": 64, "text_layers": 2, "vae_channels": (32, 32, 64)}  # fmt: skip
        path, source = write_tiny_sd15(tmp_path / "s.safetensors", seed=4, **sizes), tiny_sd15(4, **sizes)
    else:
        path = write_diffusers_folder(tmp_path / "model", source)
        if kind == "fp16 folder":
            weights = path / "unet" / "diffusion_pytorch_model.safetensors"
            weights.rename(weights.with_suffix(".fp16.safetensors"))
        if kind == "sharded folder":
            (path / "unet/diffusion_pytorch_model.safetensors").unlink()
            source.unet.save_pretrained(path / "unet", max_shard_size="3MB")
            assert len(list((path / "unet").glob("*.safetensors"))) > 1
    model = load(path)
    assert_same_weights(model, source)
    x, timesteps, conditioning = inputs(model)
    expected = source.unet(x, timesteps, conditioning.cross_attention).sample
    assert torch.equal(model.predict(x, timesteps, conditioning), expected)


def test_sdxl_folder_and_old_vae_names(tmp_path: Path, sdxl: DiffusersModel) -> None:
    path = write_diffusers_folder(tmp_path / "model", tiny_sdxl())
    weights = path / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for new, old in {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, weights)  # as in the published SD1.5 and sd-vae-ft folders
    model = load(path)
    assert_same_weights(model, tiny_sdxl())
    x, timesteps, conditioning = inputs(model)
    assert torch.equal(model.predict(x, timesteps, conditioning), sdxl.predict(*inputs(sdxl)))
    assert torch.equal(model.decode(x), sdxl.decode(x))
    config = json.loads((path / "vae/config.json").read_text())
    (path / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert inspect_checkpoint(path).scale_factor == load(path).vae.config.scaling_factor == 0.5


# ---- diffusers' pipelines as oracle


@pytest.fixture(scope="module")
def sd15_pipeline(sd15_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from diffusers import StableDiffusionPipeline

    config = write_diffusers_folder(tmp_path_factory.mktemp("c") / "model", tiny_sd15())
    for weights in config.rglob("*.safetensors"):
        weights.unlink()
    pipeline = StableDiffusionPipeline.from_single_file(
        str(sd15_path), config=str(config), local_files_only=True, safety_checker=None, torch_dtype=torch.float32
    )
    if not hasattr(pipeline.text_encoder, "text_model"):  # diffusers 0.42's clip skip has not met transformers 5 yet
        pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder
    return pipeline


def test_sd15_against_diffusers_single_file_loader(sd15: DiffusersModel, sd15_pipeline: Any) -> None:
    x, timesteps, conditioning = inputs(sd15)
    expected, _ = sd15_pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(conditioning.cross_attention, expected)
    output = sd15_pipeline.unet(x, timesteps, expected).sample
    assert torch.equal(sd15.predict(x, timesteps, conditioning), output)
    latents = sd15_pipeline.vae.encode(torch.ones(1, 3, 64, 64)).latent_dist.mean * 0.18215
    assert torch.equal(sd15.encode(torch.ones(1, 3, 64, 64)), latents)
    assert torch.allclose(sd15.alphas_cumprod, sd15_pipeline.scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip_skip", [2, 3])
def test_clip_skip_against_diffusers(sd15: DiffusersModel, sd15_pipeline: Any, clip_skip: int) -> None:
    expected, _ = sd15_pipeline.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=clip_skip - 1)  # they count from 0
    features = sd15.encode_prompts(PROMPTS, clip_skip=clip_skip, **SIZE).cross_attention
    assert torch.equal(features, expected)
    assert not torch.equal(features, sd15.encode_prompts(PROMPTS, **SIZE).cross_attention)


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


# ---- prompts


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
    assert _split_tokens([], COMMA) == [[]]
    assert [len(chunk) for chunk in _split_tokens(words[:75], COMMA)] == [75]
    assert [len(chunk) for chunk in _split_tokens(words[:76], COMMA)] == [75, 1]
    assert [len(chunk) for chunk in _split_tokens(words[:151], COMMA)] == [75, 75, 1]
    for after in (0, 1, 19, 20):  # words between the last comma and the end of the chunk
        tokens = [*words[: 74 - after], COMMA, *words[:after], *words[:5]]
        carried = after if after < 20 else 0
        chunks = _split_tokens(tokens, COMMA)
        assert [len(chunk) for chunk in chunks] == [75 - carried, 5 + carried]
        assert [token for chunk in chunks for token in chunk] == tokens
    tokens = [*words[:60], COMMA, *words[:14], COMMA, WORD]  # a comma may itself begin the next chunk
    assert [len(chunk) for chunk in _split_tokens(tokens, COMMA)] == [75, 2]


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
            assert _split_tokens(tokens, COMMA) == webui_tokenize_line(tokens)


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


def test_text_encoder_heads_matter(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "x.safetensors", text_heads=4)
    source = tiny_sd15(text_heads=4)
    ids = torch.full((1, 77), 49407)
    ids[0, :3] = torch.tensor([49406, 320, 1125])
    expected = source.text_encoders[0](input_ids=ids).last_hidden_state
    prompt = ["a photo"]
    wrong = load(path).encode_prompts(prompt, **SIZE).cross_attention
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    (tmp_path / "x.text_encoder_config.json").write_text(json.dumps(sizes))
    right = load(path).encode_prompts(prompt, **SIZE).cross_attention
    assert torch.equal(right, expected) and not torch.allclose(wrong, expected, atol=1e-3)


def test_unet_heads_from_a_yaml(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "x.safetensors", heads=4)
    path.with_suffix(".yaml").write_text("model: {params: {unet_config: {params: {num_heads: 4}}}}")
    model = load(path)
    x, timesteps, conditioning = inputs(model)
    expected = tiny_sd15(heads=4).unet(x, timesteps, conditioning.cross_attention).sample
    assert torch.equal(model.predict(x, timesteps, conditioning), expected)


# ---- VAE


def test_decode_in_batches_and_tiles(sd15: DiffusersModel) -> None:
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = sd15.decode(latents, decode_batch=2)
    assert pictures.shape == (5, 3, 64, 64) and pictures.abs().max() <= 1
    assert torch.allclose(pictures, sd15.decode(latents, decode_batch=5), atol=1e-4)
    sizes: list[int] = []
    handle = sd15.vae.post_quant_conv.register_forward_hook(lambda m, args, output: sizes.append(args[0].shape[-1]))
    wide = torch.randn(1, 4, 8, 96, generator=torch.Generator().manual_seed(1))
    tiled, whole = sd15.decode(wide, tiled=True), sd15.decode(wide)
    handle.remove()
    assert max(sizes[:-1]) == 64 and sizes[-1] == 96 and len(sizes) > 2  # 512 px a tile, then all at once
    assert tiled.shape == whole.shape == (1, 3, 64, 768)
    assert (tiled - whole).abs().mean() < 0.2 * whole.abs().mean()


def test_encode(sd15: DiffusersModel) -> None:
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    distribution = tiny_sd15().vae.encode(pixels).latent_dist
    assert torch.allclose(sd15.encode(pixels, encode_batch=2), distribution.mean * 0.18215, atol=1e-6)
    expected = (distribution.mean + distribution.std * noise) * 0.18215
    assert torch.allclose(sd15.encode(pixels, noise=noise), expected, atol=1e-6)


def other_vae() -> TinySource:
    return tiny_sd15(7, vae_channels=(32, 64, 64, 64), vae_blocks=2)


@pytest.mark.parametrize("kind", ["file", "prefix", "pickle", "folder", "model folder", "whole checkpoint"])
def test_vae_override(tmp_path: Path, sdxl_path: Path, kind: str) -> None:
    source = other_vae()
    if kind == "file":
        vae_path = write_vae(tmp_path / "vae.safetensors", source)
    elif kind == "prefix":
        vae_path = write_vae(tmp_path / "vae.safetensors", source, prefix="first_stage_model.")
    elif kind == "pickle":
        vae_path = write_vae(tmp_path / "x.vae.pt", source)
    elif kind == "whole checkpoint":
        vae_path = write_tiny_sd15(tmp_path / "w.safetensors", 7, vae_channels=(32, 64, 64, 64), vae_blocks=2)
    else:
        vae_path = write_diffusers_folder(tmp_path / "model", source) / ("vae" if kind == "folder" else "")
    model = load(sdxl_path, vae_path=vae_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = source.vae.decode(latents / 0.13025).sample.clamp(-1, 1)  # the checkpoint's scale factor
    assert torch.equal(model.decode(latents), expected)


def test_a_checkpoint_without_vae_takes_one(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "bare.safetensors", leave_out=("first_stage_model.",))
    with pytest.raises(SpoError, match="holds no VAE: give one"):
        load(path)
    model = load(path, vae_path=write_vae(tmp_path / "vae.safetensors", other_vae()))
    assert model.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 64, 64)
    path = write_tiny_sd15(tmp_path / "bare2.safetensors", leave_out=("cond_stage_model.",))
    with pytest.raises(SpoError, match="holds no text encoder"):
        load(path)


def test_vae_precision(tmp_path: Path, sd15_path: Path) -> None:
    def dtype_of(vae_path: Path | None, **options: Any) -> torch.dtype:
        model = load(sd15_path, vae_path=vae_path, dtype=torch.bfloat16, **options)
        (dtype,) = {p.dtype for p in model.vae.parameters()}
        return dtype

    assert dtype_of(None) == torch.float32
    assert dtype_of(None, vae_dtype=torch.float16) == torch.float16
    fixed = write_vae(tmp_path / "sdxl.vae.fp16-fix.safetensors", other_vae())
    assert dtype_of(fixed) == torch.bfloat16
    assert dtype_of(fixed, vae_dtype=torch.float32) == torch.float32
    folder = write_diffusers_folder(tmp_path / "model", other_vae()) / "vae"
    assert dtype_of(folder) == torch.float32
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    assert dtype_of(folder) == torch.bfloat16


def test_nan_from_a_float16_vae_is_an_error(sd15_path: Path) -> None:
    model = load(sd15_path, vae_dtype=torch.float16)
    nothing = SimpleNamespace(sample=torch.full((1, 3, 16, 16), float("nan")))
    model.vae.decode = lambda latents: nothing  # not every torch has float16 convolutions on the CPU
    with pytest.raises(SpoError, match="NaN in float16"):
        model.decode(torch.zeros(1, 4, 2, 2))


def test_wrong_vaes(tmp_path: Path, sd15_path: Path) -> None:
    def refused(vae_path: Path, message: str) -> None:
        with pytest.raises(SpoError, match=message):
            load(sd15_path, vae_path=vae_path)

    path = tmp_path / "x.safetensors"
    refused(tmp_path / "none.pt", "there is no file")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, path)
    refused(path, '"x.safetensors" is not a VAE')
    tensors = load_file(write_vae(tmp_path / "vae.safetensors", other_vae()))
    save_file({name: tensor for name, tensor in tensors.items() if "quant" not in name}, path)
    refused(path, "without quant_conv")
    save_file(tensors | {"post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}, path)
    refused(path, "16 latent channels")
    save_file({name: tensor for name, tensor in tensors.items() if "decoder.norm_out" not in name}, path)
    refused(path, r"VAE in x.safetensors is incomplete: 2 tensors are missing, such as decoder.conv_norm_out")
    save_file(tensors | {"decoder.conv_out.weight": torch.zeros(3, 5, 3, 3)}, path)
    refused(path, r"does not fit: decoder.conv_out.weight has the shape \[3, 5, 3, 3\] where \[3, 32, 3, 3\]")
    save_file(other_vae().vae.state_dict(), path)
    refused(path, "has diffusers names: give the folder")
    refused(tmp_path, "has no config.json")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    shutil.copy(path, tmp_path / "diffusion_pytorch_model.safetensors")
    refused(tmp_path, "holds a AutoencoderTiny, not a Stable Diffusion VAE")


# ---- schedule, memory, damage


def test_alphas_cumprod(tmp_path: Path, sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    expected = (1 - betas).cumprod(0).float()
    for model in (sd15, sdxl):  # the tiny SD1.5 file holds a rounded table, the SDXL file none
        assert model.alphas_cumprod.dtype == torch.float32 and torch.equal(model.alphas_cumprod, expected)
        assert not model.zero_terminal_snr

    path = write_tiny_sd15(tmp_path / "x.safetensors")
    tensors = load_file(path)
    other = (1 - betas * 1.1).cumprod(0).float()
    save_file(tensors | {"alphas_cumprod": other}, path)
    assert torch.equal(load(path).alphas_cumprod, other)
    save_file(tensors | {"alphas_cumprod": other[:500].clone()}, path)
    with pytest.raises(SpoError, match=r"schedule of the shape \[500\]"):
        load(path)
    del tensors["alphas_cumprod"]
    save_file(tensors, path)
    path.with_suffix(".yaml").write_text("model: {params: {linear_start: 0.001, linear_end: 0.01}}")
    betas = torch.linspace(0.001**0.5, 0.01**0.5, 1000, dtype=torch.float64).square()
    assert torch.equal(load(path).alphas_cumprod, (1 - betas).cumprod(0).float())


def test_zero_terminal_snr(tmp_path: Path, sdxl: DiffusersModel) -> None:
    from diffusers import DDIMScheduler

    path = write_tiny_sdxl(tmp_path / "x.safetensors")
    save_file(load_file(path) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    model = load(path)
    assert model.prediction_type == "v_prediction" and model.zero_terminal_snr
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    assert torch.allclose(model.alphas_cumprod[:-1], scheduler.alphas_cumprod[:-1], rtol=1e-3, atol=1e-6)
    assert model.alphas_cumprod[-1] == torch.tensor(4.8973451890853435e-08)  # the WebUI's number
    model = load(path, prediction_type="epsilon")
    assert torch.equal(model.alphas_cumprod, sdxl.alphas_cumprod)


def test_gradient_checkpointing(sd15_path: Path, sdxl_path: Path) -> None:
    for path in (sd15_path, sdxl_path):
        model = load(path)
        trained = model.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight.requires_grad_()
        runs: list[str] = []
        blocks = model.unet.down_blocks
        for name, part in {
            "resnets": blocks[2].resnets[0],
            "attentions": blocks[1].attentions[0].transformer_blocks[0],
        }.items():
            part.register_forward_pre_hook(lambda *_, runs=runs, name=name: runs.append(name))
        gradients = []
        for enabled in (False, True, False):
            model.set_gradient_checkpointing(enabled)
            runs.clear()
            trained.grad = None
            output = model.predict(*inputs(model))
            output.square().mean().backward()
            assert sorted(runs) == sorted(["resnets", "attentions"] * (2 if enabled else 1))
            assert trained.grad is not None
            gradients.append(trained.grad.clone())
        assert gradients[0].any() and all(torch.allclose(gradients[0], g, rtol=1e-4, atol=1e-9) for g in gradients[1:])
        assert not any(module.training for module in model.unet.modules())


def test_damaged_networks(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "x.safetensors")
    tensors = load_file(path)
    name = "model.diffusion_model.out.0.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(SpoError, match="UNet in x.safetensors is incomplete: 1 tensors are missing, such as conv_n"):
        load(path)
    save_file(tensors | {name: torch.zeros(5)}, path)
    with pytest.raises(SpoError, match=r"does not fit: conv_norm_out.weight has the shape \[5\] where \[32\]"):
        load(path)
    save_file(tensors | {"model.diffusion_model.input_blocks.1.0.extra.gain": torch.zeros(5)}, path)
    with pytest.warns(UserWarning, match="1 tensors of its UNet have no known use"):
        load(path)
    name = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(SpoError, match="text encoder 1 in x.safetensors is incomplete"):
        load(path)


def test_memory_bytes(sdxl: DiffusersModel) -> None:
    info = sdxl.info
    assert sdxl.memory_bytes() == pytest.approx(4 * info.parameters, rel=0.01)
