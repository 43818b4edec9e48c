"""Sizes of networks: full SD1.5 and SDXL (sparse files), small ones, and layouts that are refused."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from spo.checkpoint.inspect import inspect_checkpoint
from spo.checkpoint.tensor_file import TensorFile
from spo.errors import SpoError
from tests.crafted_files import HERE, UNET, VAE, Shapes, craft, full_size_shapes, refused, shapes_of
from tests.tiny_checkpoints import (
    write_tiny_sd15,
)


def test_full_size_sd15(tmp_path: Path) -> None:
    shapes = full_size_shapes("sd15")
    info = inspect_checkpoint(craft(tmp_path / "v1-5.safetensors", shapes))
    assert (info.architecture, info.prediction_type, info.dtypes) == ("sd15", "epsilon", ("F16",))
    assert dataclasses.asdict(info.unet) == {
        "channels": (320, 640, 1280, 1280),
        "res_blocks": 2,
        "depths": (1, 1, 1, 0),
        "middle_depth": 1,
        "heads": (8, 8, 8, 8),
        "context_width": 768,
        "linear_projection": False,
        "added_width": 0,
    }
    assert info.vae is not None and info.vae.channels == (128, 256, 512, 512) and info.vae.res_blocks == 2
    assert info.vae.downscale == 8 and info.scale_factor == 0.18215
    (encoder,) = info.text_encoders
    assert (encoder.width, encoder.layers, encoder.heads, encoder.mlp_width) == (768, 12, 12, 3072)
    assert (info.unet_parameters, info.vae_parameters, info.text_parameters) == (859_520_964, 83_653_863, 123_060_480)
    assert info.size_bytes == pytest.approx(2.13e9, rel=0.01)
    for row in csv.DictReader((HERE / "lora_names" / "sd15_attention.tsv").open(), delimiter="\t"):
        assert shapes[f"{UNET}{row['ldm_module']}.weight"][:2] == (int(row["out"]), int(row["in"]))


def test_full_size_sdxl(tmp_path: Path) -> None:
    shapes = full_size_shapes("sdxl")
    info = inspect_checkpoint(craft(tmp_path / "xl.safetensors", shapes))
    assert info.architecture == "sdxl"
    assert (info.unet.channels, info.unet.depths, info.unet.middle_depth) == ((320, 640, 1280), (0, 2, 10), 10)
    assert (info.unet.heads, info.unet.context_width, info.unet.added_width) == ((5, 10, 20), 2048, 2816)
    assert info.unet.linear_projection and info.scale_factor == 0.13025
    first, second = info.text_encoders
    assert (first.kind, first.width, first.layers, first.heads, first.activation) == ("clip", 768, 12, 12, "quick_gelu")
    assert (second.kind, second.activation, second.projection) == ("open_clip", "gelu", 1280)
    assert (second.width, second.layers, second.heads) == (1280, 32, 20)
    assert info.unet_parameters == 2_567_463_684
    for row in csv.DictReader((HERE / "lora_names" / "sdxl_attention.tsv").open(), delimiter="\t"):
        assert shapes[f"{UNET}{row['sgm_module']}.weight"][:2] == (int(row["out"]), int(row["in"]))


def test_full_size_networks_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: every tensor of the file finds its place in a network of the published size."""
    from spo.headless import weights
    from spo.headless.load import load_model

    def unread(file: TensorFile, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: torch.empty(file.tensors[name].shape, dtype=torch.float16, device="meta") for name in names}

    monkeypatch.setattr(weights, "read_tensors", unread)
    for architecture in ("sd15", "sdxl"):
        path = craft(tmp_path / f"{architecture}.safetensors", full_size_shapes(architecture))
        model = load_model(path, device="meta", dtype=torch.float16, vae_dtype=torch.float16)
        assert model.text_encoders.networks and model.vae.use("encoder") is None
        assert model.memory_bytes() == pytest.approx(path.stat().st_size, rel=0.001)
    assert [b.attentions[0].transformer_blocks[0].attn1.heads for b in model.unet.down_blocks[1:]] == [10, 20]
    assert len(model.unet.mid_block.attentions[0].transformer_blocks) == 10


def test_other_widths_and_levels(tmp_path: Path) -> None:
    path = write_tiny_sd15(
        tmp_path / "a.safetensors", channels=(64, 96), depths=(1, 2), res_blocks=2, heads=4, linear=True, text_width=64,
        vae_channels=(32, 32, 64), vae_blocks=2,
    )  # fmt: skip
    info = inspect_checkpoint(path)
    assert (info.unet.channels, info.unet.depths, info.unet.middle_depth) == ((64, 96), (1, 2), 2)
    assert info.unet.linear_projection and info.unet.context_width == 64
    assert info.vae is not None and (info.vae.downscale, info.vae.res_blocks) == (4, 2)


def test_text_encoder_names_without_text_model(tmp_path: Path, sd15: Path) -> None:
    shapes = {name.replace(".text_model", ""): shape for name, shape in shapes_of(sd15).items()}
    assert inspect_checkpoint(craft(tmp_path / "old.safetensors", shapes)).text_encoders[0].layers == 3


def test_text_encoder_heads_from_a_configuration(tmp_path: Path, sd15: Path, sdxl: Path) -> None:
    path = craft(tmp_path / "x.safetensors", shapes_of(sd15))
    config = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "gelu"}
    assert inspect_checkpoint(path).text_encoders[0].heads == 1

    shared = tmp_path / "text_encoder_config.json"
    shared.write_text(json.dumps(config))
    encoder = inspect_checkpoint(path).text_encoders[0]
    assert (encoder.heads, encoder.activation) == (4, "gelu")
    shared.write_text(json.dumps(config | {"hidden_size": 64}))  # of another checkpoint
    assert inspect_checkpoint(path).text_encoders[0].heads == 1

    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"text_config": config | {"num_attention_heads": 8}}))
    path.with_suffix(".yaml").write_text("model: {params: {cond_stage_config: {params: {version: clip}}}}")
    assert inspect_checkpoint(path).text_encoders[0].heads == 8

    own = tmp_path / "x.text_encoder_config.json"
    own.write_text(json.dumps(config | {"num_attention_heads": 2}))
    assert inspect_checkpoint(path).text_encoders[0].heads == 2
    own.write_text(json.dumps(config | {"num_attention_heads": 3}))
    with pytest.raises(SpoError, match="num_attention_heads 3, which does not divide 32"):
        inspect_checkpoint(path)
    own.write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(SpoError, match=r"does not fit the text encoder in x.safetensors, which is 32 wide"):
        inspect_checkpoint(path)

    xl = craft(tmp_path / "xl.safetensors", shapes_of(sdxl))
    second = tmp_path / "xl.text_encoder_2_config.json"
    second.write_text(json.dumps(config | {"num_hidden_layers": 2, "num_attention_heads": 16}))
    assert [e.heads for e in inspect_checkpoint(xl).text_encoders] == [1, 16]


def test_changed_checkpoints(tmp_path: Path, sd15: Path, sdxl: Path) -> None:
    def without(path: Path, *parts: str) -> Shapes:
        return {name: shape for name, shape in shapes_of(path).items() if not any(part in name for part in parts)}

    path = tmp_path / "x.safetensors"
    refused(craft(path, without(sdxl, "middle_block.1.")), "irregular layout .pruned or distilled, like SSD-1B")
    refused(craft(path, without(sdxl, "output_blocks.0.1.transformer_blocks.1.")), "irregular layout")
    refused(craft(path, without(sd15, "input_blocks.3.")), "irregular layout")
    refused(craft(path, without(sdxl, "embedders.1.model.")), "only one of its two text encoders")
    refused(craft(path, without(sd15, "post_quant_conv")), "without quant_conv")
    refused(craft(path, without(sd15, "decoder.up", "encoder.down")), "VAE of another layout")
    shapes = shapes_of(sd15)
    refused(craft(path, shapes | {f"{VAE}post_quant_conv.weight": (16, 16, 1, 1)}), "VAE with 16 latent channels")
    embedding = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    refused(craft(path, shapes | {embedding: (1000, 32)}), "text encoder for 1000 tokens")
    refused(craft(path, without(sd15, "encoder.layers.0.mlp.fc1.weight")), "incomplete: the tensor .* is missing")
    refused(craft(path, shapes | {f"{UNET}input_blocks.0.0.weight": (16, 4, 3, 3)}), "wider than its input")
