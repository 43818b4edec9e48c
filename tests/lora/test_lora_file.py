"""LoRA files: written, read back, refused; and loaded by diffusers, whose output has to be that of training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from spo.errors import SpoError
from spo.lora import lora_file
from spo.lora.lora_file import (
    LoraFacts,
    LoraFile,
    LoraLayer,
    check_matches,
    describe,
    lora_metadata,
    read_lora,
    with_one_alpha,
    write_lora,
)
from spo.lora.module_names import file_name, to_ldm
from tests.tiny_networks import output, tiny_unet, weighted

SD15_QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
SDXL_QUERY = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
FACTS = LoraFacts(
    architecture="sd15",
    prediction_type="epsilon",
    rank=2,
    alpha=1.0,
    checkpoint_name="model.safetensors",
    checkpoint_hash="0123456789",
    started_at=1_700_000_000.25,
    learning_rate=6e-5,
    steps=30,
    epochs=2,
    seed=7,
    batch_size=10,
    precision="float16",
    run_id="run",
    spo_config={"beta": 10.0, "modules": ["attention"], "prompts": "Füße.txt"},
    finished_at=1_700_000_100.0,
)


def layer(seed: int = 0, shape: tuple[int, ...] = (6, 4), rank: int = 2, alpha: float = 1.0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return LoraLayer(down, torch.randn(shape[0], rank, *[1] * len(shape[2:]), generator=generator), alpha)


def two_layers() -> dict[str, LoraLayer]:
    convolution = layer(1, (8, 4, 3, 3), rank=3, alpha=0.1)
    return {SD15_QUERY: layer(), "lora_unet_down_blocks_0_resnets_0_conv1": convolution}


def folder_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(dict(tensors), str(path), metadata)
    return path


def kohya(name: str, lora: LoraLayer, alpha: bool = True) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_down.weight": lora.down, f"{name}.lora_up.weight": lora.up}
    return {**tensors, f"{name}.alpha": torch.tensor(lora.alpha)} if alpha else tensors


# ---------------------------------------------------------------------------------------------- writing and reading


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "my lora.v2.safetensors"
    layers = two_layers()
    metadata = lora_metadata("my lora.v2", FACTS)
    write_lora(path, layers, metadata, dtype=dtype)
    found = read_lora(path)
    assert folder_names(tmp_path) == [path.name]
    assert set(found.layers) == set(layers)
    for name, written in layers.items():
        assert torch.equal(found.layers[name].down, written.down.to(dtype).float())
        assert torch.equal(found.layers[name].up, written.up.to(dtype).float())
        assert found.layers[name].alpha == pytest.approx(written.alpha, rel=1e-7)
        assert found.layers[name].down.dtype == found.layers[name].up.dtype == torch.float32
    assert (found.architecture, found.dtype) == ("sd15", str(dtype).removeprefix("torch."))
    assert found.size_bytes == path.stat().st_size
    assert metadata.items() <= found.metadata.items()
    assert json.loads(found.metadata["spo_config"]) == FACTS.spo_config


def test_the_file_holds_kohyas_tensors_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_lora(path, two_layers(), {})
    with safe_open(str(path), framework="pt") as file:
        found = {name: (tuple(file.get_tensor(name).shape), file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    half = torch.float16
    convolution = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert found == {
        f"{SD15_QUERY}.alpha": ((), torch.float32),
        f"{SD15_QUERY}.lora_down.weight": ((2, 4), half),
        f"{SD15_QUERY}.lora_up.weight": ((6, 2), half),
        f"{convolution}.alpha": ((), torch.float32),
        f"{convolution}.lora_down.weight": ((3, 4, 3, 3), half),
        f"{convolution}.lora_up.weight": ((8, 3, 1, 1), half),
    }


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    big = {SD15_QUERY: layer(shape=(900, 900), rank=700)}  # beyond the megabyte where the old hash begins
    metadata = lora_metadata("x", FACTS)
    write_lora(path, big, metadata)
    content = path.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    found = read_lora(path).metadata
    assert found["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    training_only = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    old = safetensors.torch.save(safetensors.torch.load_file(str(path)), training_only)
    assert found["sshs_legacy_hash"] == hashlib.sha256(old[0x100000:0x110000]).hexdigest()[:8]
    assert found["sshs_legacy_hash"] != hashlib.sha256(b"").hexdigest()[:8]


def test_layers_are_written_whatever_their_strides_and_gradients(tmp_path: Path) -> None:
    made = layer()
    strided = LoraLayer(nn.Parameter(made.down.T.contiguous().T), made.up.repeat(1, 2)[:, :2], 1.0)
    assert not strided.down.is_contiguous() and not strided.up.is_contiguous() and strided.down.requires_grad
    write_lora(tmp_path / "x.safetensors", {SD15_QUERY: strided}, {}, dtype=torch.float32)
    found = read_lora(tmp_path / "x.safetensors").layers[SD15_QUERY]
    assert torch.equal(found.down, made.down) and torch.equal(found.up, made.up)


def test_one_alpha_changes_no_layer_s_effect() -> None:
    layers = {"a": layer(0, alpha=2.0), "b": layer(1, (8, 4, 3, 3), rank=3, alpha=0.5), "c": layer(2, alpha=2.0)}
    found = with_one_alpha(layers)
    assert [lora.alpha for lora in found.values()] == [2.0, 2.0, 2.0]
    assert found["a"] is layers["a"]
    for name, lora in layers.items():
        assert found[name].norm() == pytest.approx(lora.norm(), rel=1e-6)
        assert torch.equal(found[name].down, lora.down)


def test_norm_is_that_of_the_change() -> None:
    lora = layer(3, (8, 4, 3, 3), rank=3, alpha=0.5)
    change = 0.5 / 3 * torch.einsum("or,rikl->oikl", lora.up[:, :, 0, 0], lora.down)
    assert lora.weight_shape == tuple(change.shape)
    assert lora.norm() == pytest.approx(float(change.norm()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- metadata


def test_metadata_of_sd15() -> None:
    config = {"beta": 10.0, "modules": ["attention"], "prompts": "Füße.txt"}
    found = lora_metadata("name", FACTS)
    assert json.loads(found.pop("spo_config")) == config
    assert found.pop("spo_version")
    assert found == {
        "ss_output_name": "name",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": "model.safetensors",
        "ss_sd_model_hash": "0123456789",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
        "ss_training_started_at": "1700000000.25",
        "ss_training_finished_at": "1700000100.0",
        "ss_learning_rate": "6e-05",
        "ss_unet_lr": "6e-05",
        "ss_steps": "30",
        "ss_num_epochs": "2",
        "ss_seed": "7",
        "ss_total_batch_size": "10",
        "ss_mixed_precision": "fp16",
        "ss_resolution": "(512, 512)",
        "ss_tag_frequency": "{}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "name",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.date": "2023-11-14T22:15:00+00:00",
        "spo_run_id": "run",
    }


def test_metadata_of_sdxl() -> None:
    facts = dataclasses.replace(
        FACTS, architecture="sdxl", prediction_type="v_prediction", precision="float32", checkpoint_hash="ab" * 32,
        width_px=832, height_px=1216, tag_frequency={"prompts": {"cat": 2}}, run_id="",
    )  # fmt: skip
    found = lora_metadata("name", facts)
    assert all(isinstance(value, str) for value in found.values())
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_hash": "ababababab",
        "ss_new_sd_model_hash": "ab" * 32,
        "ss_mixed_precision": "no",
        "ss_resolution": "(832, 1216)",
        "ss_tag_frequency": '{"prompts": {"cat": 2}}',
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "832x1216",
        "modelspec.prediction_type": "v",
    }
    assert expected.items() <= found.items()
    assert "spo_run_id" not in found
    assert "ss_sd_model_hash" not in lora_metadata("name", dataclasses.replace(facts, checkpoint_hash=""))


@pytest.mark.parametrize(
    ("name", "value"), [("architecture", "sd3"), ("prediction_type", "flow"), ("precision", "int8")]
)
def test_metadata_refuses_unknown_words(name: str, value: str) -> None:
    with pytest.raises(SpoError, match=f'{name} "{value}".*choose from'):
        lora_metadata("name", dataclasses.replace(FACTS, **{name: value}))


# -------------------------------------------------------------------------------------------------- refusing to write


def test_an_existing_file_is_replaced_only_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(SpoError, match=r"x\.safetensors.*exists already"):
        write_lora(path, two_layers(), {})
    assert path.read_bytes() == b"precious"
    write_lora(path, two_layers(), {}, replace=True)
    assert len(read_lora(path).layers) == 2
    assert folder_names(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_during_the_writing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    path = tmp_path / "x.safetensors"
    really_verify = lora_file._verify

    def someone_is_faster(*arguments: Any) -> None:
        really_verify(*arguments)
        path.write_bytes(b"precious")

    monkeypatch.setattr(lora_file, "_verify", someone_is_faster)
    if not hard_links:
        monkeypatch.setattr(os, "link", no_hard_links)
    with pytest.raises(SpoError, match="exists already"):
        write_lora(path, two_layers(), {})
    assert path.read_bytes() == b"precious"
    assert folder_names(tmp_path) == ["x.safetensors"]


def no_hard_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_hard_links)
    write_lora(tmp_path / "x.safetensors", two_layers(), {})
    assert len(read_lora(tmp_path / "x.safetensors").layers) == 2
    assert folder_names(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="modes of files are POSIX")
def test_the_file_gets_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_lora(tmp_path / "x.safetensors", two_layers(), {})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("dead")])
@pytest.mark.parametrize(
    ("call", "existing", "links"),
    [
        ("fsync", False, True),
        ("fsync", True, True),
        ("link", False, True),
        ("replace", False, False),
        ("replace", True, True),
    ],
)
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: str, existing: bool, links: bool
) -> None:
    path = tmp_path / "x.safetensors"
    if existing:
        path.write_bytes(b"precious")
    if not links:
        monkeypatch.setattr(os, "link", no_hard_links)
    if call == "link" and isinstance(error, OSError):  # a file system without hard links, which is full besides
        monkeypatch.setattr(os, "replace", no_hard_links)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(SpoError if isinstance(error, OSError) else type(error)):
        write_lora(path, two_layers(), {}, replace=existing)
    assert folder_names(tmp_path) == (["x.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == b"precious"


def lose_a_tensor(content: bytes) -> bytes:
    tensors = safetensors.torch.load(content)
    tensors.popitem()
    return safetensors.torch.save(tensors)


def flip_a_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("spoil", [lose_a_tensor, flip_a_bit, lambda content: content[:-7], lambda _: b""])
def test_what_reads_back_differently_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
) -> None:
    really_write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: really_write(path, spoil(content)))
    with pytest.raises(SpoError, match=r"x\.safetensors.* was not saved"):
        write_lora(tmp_path / "x.safetensors", two_layers(), {})
    assert folder_names(tmp_path) == []


def changed(**parts: Tensor | float) -> dict[str, LoraLayer]:
    return {SD15_QUERY: dataclasses.replace(layer(), **parts)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ({}, "no LoRA layers"),
        ({"unet.down_blocks.0": layer()}, '"unet.down_blocks.0" is not a name'),
        (changed(up=torch.zeros(6, 2)), "would do nothing"),
        (changed(down=torch.zeros(2, 4)), "would do nothing"),
        (changed(alpha=0.0), "would do nothing"),
        (changed(up=torch.full((6, 2), 1e-9)), "would do nothing"),
        (changed(up=torch.full((6, 2), 70000.0)), "lora_up.weight.* reaches 70000, and float16 ends at 65504"),
        (changed(up=torch.full((6, 2), float("nan"))), "not finite"),
        (changed(down=torch.full((2, 4), float("inf"))), "not finite"),
        (changed(alpha=float("nan")), "not finite"),
        (changed(up=torch.ones(6, 3)), r"do not belong together: down \[2, 4\], up \[6, 3\]"),
        (changed(up=torch.ones(6, 2, 3, 3)), "do not belong together"),
    ],
)
def test_layers_that_cannot_be_saved(tmp_path: Path, layers: dict[str, LoraLayer], sentence: str) -> None:
    with pytest.raises(SpoError, match=sentence):
        write_lora(tmp_path / "x.safetensors", layers, {})
    assert folder_names(tmp_path) == []


def test_large_values_and_empty_loras_on_demand(tmp_path: Path) -> None:
    write_lora(tmp_path / "x.safetensors", changed(up=torch.full((6, 2), 70000.0)), {}, dtype=torch.bfloat16)
    write_lora(tmp_path / "y.safetensors", changed(up=torch.zeros(6, 2)), {}, allow_zero=True)
    assert describe(read_lora(tmp_path / "y.safetensors")).zero_layers == 1


def test_one_layer_may_be_zero(tmp_path: Path) -> None:
    """As the query and key of a self-attention over one token, which never get a gradient."""
    convolution = {"lora_unet_conv_in": layer(shape=(8, 4, 3, 3))}
    write_lora(tmp_path / "x.safetensors", {**changed(up=torch.zeros(6, 2)), **convolution}, {})
    assert describe(read_lora(tmp_path / "x.safetensors")).zero_layers == 1


@pytest.mark.parametrize(
    ("name", "metadata", "sentence"),
    [
        ("x.pt", {}, r"has to end in \.safetensors"),
        ("nowhere/x.safetensors", {}, "no folder"),
        ("x.safetensors", {"ss_output_name": "y"}, 'its name is "y", not "x"'),
    ],
)
def test_targets_that_are_refused(tmp_path: Path, name: str, metadata: dict[str, str], sentence: str) -> None:
    with pytest.raises(SpoError, match=sentence):
        write_lora(tmp_path / name, two_layers(), metadata)
    assert folder_names(tmp_path) == []


def test_a_dtype_for_no_file(tmp_path: Path) -> None:
    with pytest.raises(SpoError, match=r"torch\.float64; choose from float16, bfloat16, float32"):
        write_lora(tmp_path / "x.safetensors", two_layers(), {}, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ names in the wild

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
SPELLINGS = {
    "kohya": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight"),
    "kohya with peft's parts": ("lora_unet_{flat}.lora_A.weight", "lora_unet_{flat}.lora_B.weight"),
    "diffusers now": ("unet.{dotted}.lora_A.weight", "unet.{dotted}.lora_B.weight"),
    "diffusers before": ("unet.{dotted}.lora.down.weight", "unet.{dotted}.lora.up.weight"),
    "attention processors": ("unet.{processor}_lora.down.weight", "unet.{processor}_lora.up.weight"),
    "bare attention processors": ("{processor}_lora.down.weight", "{processor}_lora.up.weight"),
    "peft": ("base_model.model.{dotted}.lora_A.weight", "base_model.model.{dotted}.lora_B.weight"),
    "peft, unet": ("base_model.model.unet.{dotted}.lora_A.weight", "base_model.model.unet.{dotted}.lora_B.weight"),
    "peft in memory": ("{dotted}.lora_A.default.weight", "{dotted}.lora_B.default.weight"),
    "ComfyUI": ("diffusion_model.{dotted}.lora_down.weight", "diffusion_model.{dotted}.lora_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
@pytest.mark.parametrize("naming", ["diffusers", "ldm"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(tmp_path: Path, spelling: str, naming: str, architecture: str) -> None:
    width = {"sd15": 768, "sdxl": 2048}[architecture]
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    layers = {QUERY: layer(0, (640, 640)), OUT: layer(1, (640, 640), rank=3), key: layer(2, (640, width), rank=4)}
    tensors = {}
    for module, lora in layers.items():
        dotted = to_ldm(module) if naming == "ldm" else module
        processor = re.sub(r"(attn[12])\.", r"\1.processor.", dotted).removesuffix(".0")
        for pattern, weight in zip(SPELLINGS[spelling], (lora.down, lora.up), strict=True):
            tensors[pattern.format(flat=dotted.replace(".", "_"), dotted=dotted, processor=processor)] = weight
    found = read_lora(save(tmp_path / "x.safetensors", tensors))
    assert found.architecture == architecture
    assert set(found.layers) == {file_name(module, "diffusers", architecture) for module in layers}
    for module, lora in layers.items():
        read = found.layers[file_name(module, "diffusers", architecture)]
        assert torch.equal(read.down, lora.down) and torch.equal(read.up, lora.up)
        assert read.alpha == lora.rank == read.rank


def test_alpha_of_the_file_counts_whatever_its_shape(tmp_path: Path) -> None:
    tensors = kohya(SD15_QUERY, layer(), alpha=False)
    for alpha in (torch.tensor(3.0), torch.tensor([3.0], dtype=torch.float16)):
        path = save(tmp_path / "x.safetensors", {**tensors, f"{SD15_QUERY}.alpha": alpha})
        assert read_lora(path).layers[SD15_QUERY].alpha == 3


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_alpha_of_diffusers_is_in_its_metadata(tmp_path: Path, prefix: str) -> None:
    tensors = {f"unet.{QUERY}.lora_A.weight": layer().down, f"unet.{QUERY}.lora_B.weight": layer().up}
    tensors |= {f"unet.{OUT}.lora_A.weight": layer().down, f"unet.{OUT}.lora_B.weight": layer().up}
    settings = {f"{prefix}lora_alpha": 8, f"{prefix}alpha_pattern": {"attn2.to_out.0": 5}, f"{prefix}use_rslora": False}
    metadata = {"lora_adapter_metadata": json.dumps(settings), "modelspec.architecture": "stable-diffusion-v1/lora"}
    found = read_lora(save(tmp_path / "x.safetensors", tensors, metadata)).layers
    alphas = [found[file_name(module, "diffusers", "sd15")].alpha for module in (QUERY, OUT)]
    assert alphas == [8, 5]
    metadata["lora_adapter_metadata"] = json.dumps({**settings, f"{prefix}use_rslora": True})
    found = read_lora(save(tmp_path / "x.safetensors", tensors, metadata)).layers
    rank_stabilized = found[file_name(QUERY, "diffusers", "sd15")]
    assert rank_stabilized.alpha / rank_stabilized.rank == pytest.approx(8 / math.sqrt(2))
    metadata["lora_adapter_metadata"] = "{"
    with pytest.raises(SpoError, match="settings of peft"):
        read_lora(save(tmp_path / "x.safetensors", tensors, metadata))


def test_alpha_of_peft_stands_beside_the_file(tmp_path: Path) -> None:
    name = "base_model.model.up_blocks.3.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": layer().down, f"{name}.lora_B.weight": layer().up}
    path = save(tmp_path / "adapter_model.safetensors", tensors)
    assert read_lora(path).layers["lora_unet_up_blocks_3_attentions_0_proj_in"].alpha == 2
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16, "alpha_pattern": {}}', encoding="utf-8")
    assert read_lora(path).layers["lora_unet_up_blocks_3_attentions_0_proj_in"].alpha == 16


def test_text_encoder_layers_are_told_not_read(tmp_path: Path) -> None:
    text = [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ]
    tensors = kohya(SD15_QUERY, layer()) | kohya(text[0], layer(), alpha=False)
    parts = {"down": layer().down, "up": layer().up}
    tensors |= {f"{text[1]}.lora_linear_layer.{part}.weight": weight for part, weight in parts.items()}
    found = read_lora(save(tmp_path / "x.safetensors", tensors))
    assert sorted(found.text_encoder_layers) == text
    assert list(found.layers) == [SD15_QUERY]


# ------------------------------------------------------------------------------------------------------ architecture

SDXL_STYLE_OF_SD15 = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
SAYS_SDXL = {"ss_base_model_version": "sdxl_base_v1-0"}
MIDDLE = "unet.mid_block.attentions.0.proj_in"


def architecture_of(path: Path, names: list[str], metadata: dict[str, str] | None = None, width: int = 4) -> str:
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= kohya(name, layer(shape=(320, width) if name.endswith(("to_k", "to_v")) else (6, 4)), alpha=False)
    return read_lora(save(path / "x.safetensors", tensors, metadata)).architecture


@pytest.mark.parametrize(
    ("names", "metadata", "width", "expected"),
    [
        (["lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"], SAYS_SDXL, 768, "sd15"),
        (["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"], {}, 2048, "sdxl"),
        ([SD15_QUERY], SAYS_SDXL, 4, "sdxl"),
        (["lora_unet_middle_block_1_proj_in"], {"modelspec.architecture": "stable-diffusion-v1/lora"}, 4, "sd15"),
        ([MIDDLE], {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, 4, "sdxl"),
        ([MIDDLE, "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"], {}, 4, "sdxl"),
        ([MIDDLE, "lora_te2_text_model_encoder_layers_0_mlp_fc1"], {}, 4, "sdxl"),
        ([SDXL_STYLE_OF_SD15], {}, 4, "sd15"),
        (["unet.up_blocks.0.attentions.0.proj_in"], {}, 4, "sdxl"),
        (["unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q"], {}, 4, "sdxl"),
        (["unet.up_blocks.3.resnets.0.conv1"], {}, 4, "sd15"),
        (["lora_unet_mid_block_attentions_0_proj_in"], {}, 4, "sd15"),
        (["lora_unet_middle_block_1_proj_in"], {}, 4, "sdxl"),
    ],
)  # fmt: skip
def test_architecture_is_found(
    tmp_path: Path, names: list[str], metadata: dict[str, str], width: int, expected: str
) -> None:
    assert architecture_of(tmp_path, names, metadata, width) == expected


@pytest.mark.parametrize(
    ("metadata", "width", "sentence"),
    [
        ({}, 1024, "is a LoRA for Stable Diffusion 2;"),
        ({}, 1280, "is a LoRA for the SDXL refiner;"),
        ({"ss_v2": "True"}, 4, "is a LoRA for Stable Diffusion 2;"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, 4, "is a LoRA for Stable Diffusion 2;"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"}, 4, "is a LoRA for the SDXL refiner;"),
    ],
)
def test_other_stable_diffusions_are_refused(
    tmp_path: Path, metadata: dict[str, str], width: int, sentence: str
) -> None:
    names = ["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"]
    with pytest.raises(SpoError, match=sentence):
        architecture_of(tmp_path, names, metadata, width)


def test_an_architecture_that_nothing_tells(tmp_path: Path) -> None:
    with pytest.raises(SpoError, match="does not tell whether"):
        architecture_of(tmp_path, [MIDDLE])


# -------------------------------------------------------------------------------------------------- refusing to read

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ([f"{Q}.hada_w1_a", f"{Q}.hada_w1_b", f"{Q}.alpha"], "a LoHa file"),
        ([f"{Q}.lokr_w1", f"{Q}.lokr_w2", f"{Q}.alpha"], "a LoKr file"),
        ([f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", f"{Q}.dora_scale"], "a DoRA file"),
        ([f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_magnitude_vector"], "a DoRA file"),
        ([f"{Q}.oft_blocks", f"{Q}.alpha"], "an OFT file"),
        ([f"{Q}.weight", f"{Q}.on_input"], r"an \(IA\)\^3 file"),
        ([f"{Q}.a1.weight", f"{Q}.b1.weight"], "a GLoRA file"),
        ([f"{Q}.lora_down.weight", f"{Q}.lora_mid.weight", f"{Q}.lora_up.weight"], "a LoCon file with Tucker"),
        ([f"{Q}.diff"], "a file with whole differences"),
        ([f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", "bundle_emb.x.emb_params"], "a LoRA with embeddings bundled"),
        (["lora_controlnet", "input_blocks.0.0.weight"], "a Control-LoRA"),
        (["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora_A.weight"], "an AnimateDiff"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a LoRA for Flux"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA for Flux"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"], "a LoRA for Stable Diffusion 3"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA for Stable Diffusion 3"),
        (["transformer.proj_out.lora_A.weight"], "a LoRA for a transformer"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "a LoRA for a transformer"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
          "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], "a LoRA for text encoders only"),
        (["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
          "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight",
          "lora_unet_tail_0.lora_down.weight", "lora_unet_tail_0.lora_up.weight"], 'no "lora_unet_tail_0"'),
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"], "a whole checkpoint"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a whole UNet"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"], "a VAE"),
        (["text_model.embeddings.token_embedding.weight", "text_model.a", "text_model.b"], "a text encoder"),
        (["double_blocks.0.img_attn.qkv.weight", "final_layer.x", "img_in.x"], "a whole transformer model"),
        (["control_model.input_blocks.0.0.weight", "control_model.x", "control_model.y"], "a ControlNet"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight", "image_proj.norm.weight"], "an IP-Adapter"),
        (["emb_params"], "a textual inversion embedding"),
        (["clip_l", "clip_g"], "a textual inversion embedding"),
        (["<cat>"], "a textual inversion embedding"),
        (["768.0.linear.0.weight", "768.1.linear.0.weight", "320.0.linear.0.weight"], "a hypernetwork"),
        (["alpha.beta", "gamma", "delta"], "not a LoRA .3 tensors"),
        ([], "an empty file"),
    ],
)  # fmt: skip
def test_other_kinds_of_files_are_named(tmp_path: Path, names: list[str], what: str) -> None:
    path = save(tmp_path / "some.safetensors", {name: torch.ones(2, 2) for name in names})
    with pytest.raises(SpoError, match=rf'"some\.safetensors" is {what}' if "tail" not in what else what) as raised:
        read_lora(path)
    assert "\n" not in str(raised.value)


def test_an_embedding_is_known_by_its_width(tmp_path: Path) -> None:
    with pytest.raises(SpoError, match="is a textual inversion embedding"):
        read_lora(save(tmp_path / "x.safetensors", {"my style": torch.ones(3, 768)}))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({f"{Q}.lora_down.weight": torch.ones(2, 4)}, "is incomplete: .*has no up"),
        ({f"{Q}.alpha": torch.ones(())}, "is incomplete: .*has no down and no up"),
        (kohya(Q, layer()) | {f"{Q}.scale": torch.ones(())}, "no part of a LoRA layer"),
        (kohya(Q, layer()) | kohya(SDXL_STYLE_OF_SD15, layer()), "two LoRA layers for the same module"),
        (kohya(Q, layer()) | {f"{Q}.lora_A.weight": torch.ones(2, 4)}, "the same thing twice"),
        (kohya(Q, dataclasses.replace(layer(), up=torch.ones(6, 5))), "do not belong together"),
        (kohya(Q, dataclasses.replace(layer(), down=torch.full((2, 4), math.nan))), "not finite"),
        (kohya(Q, dataclasses.replace(layer(), down=torch.ones(2, 4, dtype=torch.int8))), "is torch.int8"),
        (kohya(Q, dataclasses.replace(layer(), down=torch.ones(0, 4), up=torch.ones(6, 0))), "cannot be used"),
    ],
)
def test_damaged_loras_are_refused(tmp_path: Path, tensors: dict[str, Tensor], sentence: str) -> None:
    with pytest.raises(SpoError, match=sentence):
        read_lora(save(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "truncated"),
        (b"\x10\0\0\0\0\0\0\0{", "truncated"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"GGUF" + bytes(40), "GGUF"),
        (b"nothing of the kind at all", "is a text file"),
        (b"\x04\0\0\0\0\0\0\0{[]}", "not a safetensors"),
    ],
)
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SpoError, match=sentence):
        read_lora(path)


@pytest.mark.parametrize("cut", [1, 100, 0.5, 0.9])
def test_a_truncated_lora(tmp_path: Path, cut: float) -> None:
    path = tmp_path / "x.safetensors"
    write_lora(path, two_layers(), lora_metadata("x", FACTS))
    content = path.read_bytes()
    path.write_bytes(content[: -cut if cut >= 1 else int(cut * len(content))])  # type: ignore[misc]
    with pytest.raises(SpoError, match="truncated"):
        read_lora(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"string_to_param": {"*": torch.ones(2, 768)}}, "a textual inversion embedding"),
        ({768: ({}, {}), "layer_structure": [1, 2, 1]}, "a hypernetwork"),
        ({"state_dict": {"model.diffusion_model.out.2.weight": torch.ones(1)}}, "a whole checkpoint"),
        ({f"{Q}.lora_down.weight": torch.ones(1)}, "a LoRA"),
        ({"weights": torch.ones(1)}, "a file"),
    ],
)
def test_pickles_are_named_without_loading_them(
    tmp_path: Path, content: dict[str, object], what: str, zipped: bool
) -> None:
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(SpoError, match=rf'"x\.pt" is {what} in the old pickle format'):
        read_lora(tmp_path / "x.pt")


def test_no_file_and_no_file_but_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SpoError, match="there is no file"):
        read_lora(tmp_path / "x.safetensors")
    with pytest.raises(SpoError, match="is not a file"):
        read_lora(tmp_path)


# ---------------------------------------------------------------------------------- matching a network, describing


def loras_for(unet: nn.Module, architecture: str, names: list[str]) -> dict[str, LoraLayer]:
    """Random layers by file name; ranks and alphas differ from layer to layer."""
    modules = weighted(unet)
    made = {}
    for index, name in enumerate(names):
        lora = layer(index, tuple(modules[name].weight.shape), rank=1 + index % 3, alpha=0.5 + index % 2)  # type: ignore[arg-type]
        made[file_name(name, "diffusers", architecture, list(modules))] = lora
    return made


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_a_file_finds_the_modules_of_its_network(tmp_path: Path, architecture: str) -> None:
    unet = tiny_unet(architecture)
    names = list(weighted(unet))
    layers = loras_for(unet, architecture, names)
    metadata = lora_metadata("x", dataclasses.replace(FACTS, architecture=architecture))
    write_lora(tmp_path / "x.safetensors", layers, metadata, dtype=torch.float32)
    found = check_matches(read_lora(tmp_path / "x.safetensors"), unet, "diffusers", architecture)
    assert set(found) == set(names)
    for name, lora in zip(names, layers.values(), strict=True):
        assert torch.equal(found[name].down, lora.down) and torch.equal(found[name].up, lora.up)


def read(architecture: str, layers: dict[str, LoraLayer]) -> LoraFile:
    return LoraFile(Path("x.safetensors"), architecture, layers, (), {}, "float32", 0)


class Network(nn.Module):
    """Two modules at places that SD1.5 and SDXL have both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3)
        self.mid_block = nn.Module()
        self.mid_block.attentions = nn.ModuleList([nn.Module()])
        self.mid_block.attentions[0].proj_in = nn.Conv2d(4, 6, 1)
        self.mid_block.attentions[0].norm = nn.GroupNorm(2, 4)


def test_a_lora_for_another_network_is_refused() -> None:
    network = Network()
    with pytest.raises(SpoError, match=r"x\.safetensors. is a LoRA for SDXL, and the checkpoint is Stable Diff"):
        check_matches(read("sdxl", {SDXL_QUERY: layer()}), network, "diffusers", "sd15")
    with pytest.raises(SpoError, match=f'1 layers that the checkpoint has not, the first "{SD15_QUERY}"'):
        check_matches(read("sd15", {SD15_QUERY: layer()}), network, "diffusers", "sd15")
    for shape in ((8, 4), (8, 4, 1, 1), (8, 5, 3, 3)):
        with pytest.raises(SpoError, match=r"does not fit .*conv_in.* the checkpoint's has \[8, 4, 3, 3\]"):
            check_matches(read("sd15", {"lora_unet_conv_in": layer(shape=shape)}), network, "diffusers", "sd15")


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1)])
def test_a_linear_layer_fits_a_convolution_of_one_pixel(shape: tuple[int, ...]) -> None:
    lora = layer(shape=shape)
    file = read("sd15", {"lora_unet_mid_block_attentions_0_proj_in": lora})
    found = check_matches(file, Network(), "diffusers", "sd15")["mid_block.attentions.0.proj_in"]
    assert (found.down.shape, found.up.shape) == ((2, 4, 1, 1), (6, 2, 1, 1))
    assert torch.equal(found.down.flatten(), lora.down.flatten())
    network = Network()
    network.mid_block.attentions[0].proj_in = nn.Linear(4, 6)
    found = check_matches(file, network, "diffusers", "sd15")["mid_block.attentions.0.proj_in"]
    assert (found.down.shape, found.up.shape) == ((2, 4), (6, 2))


def test_description(tmp_path: Path) -> None:
    layers = {
        SD15_QUERY: layer(),
        SD15_QUERY.replace("attn1", "attn2"): layer(rank=3, alpha=2.0),
        "lora_unet_down_blocks_0_downsamplers_0_conv": layer(1, (8, 8, 3, 3)),
        "lora_unet_mid_block_resnets_0_time_emb_proj": layer(2),
        "lora_unet_time_embedding_linear_1": dataclasses.replace(layer(), up=torch.zeros(6, 2)),
    }
    write_lora(tmp_path / "x.safetensors", layers, lora_metadata("x", FACTS), dtype=torch.float32)
    found = describe(read_lora(tmp_path / "x.safetensors"))
    kinds = ("self-attention", "cross-attention", "resampling", "residual block", "other")
    assert found.kinds == dict.fromkeys(kinds, 1)
    assert (dict(found.ranks), dict(found.alphas)) == ({2: 4, 3: 1}, {1.0: 4, 2.0: 1})
    assert found.zero_layers == 1
    assert found.norm == pytest.approx(math.sqrt(sum(lora.norm() ** 2 for lora in layers.values())), rel=1e-6)
    text = found.text()
    for part in ("x.safetensors", "float32", "LoRA for Stable Diffusion 1.5", "2 (4 layers), 3 (1 layers)", "6e-05",
                 "model.safetensors", "0123456789", "1 layers change nothing", "2023-11-14"):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


# ------------------------------------------------------------------------------- diffusers loads what peft had trained


def attention_only(name: str) -> bool:
    return ".attn1.to_" in name or ".attn2.to_" in name


def any_block(name: str) -> bool:
    return name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks")


@pytest.mark.parametrize("wanted", [attention_only, any_block])
@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_diffusers_loads_the_file_and_gives_the_output_of_the_training_side(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    wanted: Callable[[str], bool],
) -> None:
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    from diffusers.utils import USE_PEFT_BACKEND

    if not USE_PEFT_BACKEND:
        pytest.skip("diffusers loads no LoRA beside this version of transformers (USE_PEFT_BACKEND is False)")
    unet = tiny_unet(architecture)
    names = [name for name in weighted(unet) if wanted(name)]
    plain = output(unet, architecture)
    trained = loras_for(unet, architecture, names)
    config = peft.LoraConfig(
        r=1,
        target_modules=names,
        rank_pattern={name: lora.rank for name, lora in zip(names, trained.values(), strict=True)},
        alpha_pattern={name: lora.alpha for name, lora in zip(names, trained.values(), strict=True)},
    )
    peft.inject_adapter_in_model(config, unet, "trained")
    for name, lora in zip(names, trained.values(), strict=True):
        module = unet.get_submodule(name)
        module.lora_A["trained"].weight.data.copy_(0.2 * lora.down)
        module.lora_B["trained"].weight.data.copy_(lora.up)
        assert module.scaling["trained"] == lora.alpha / lora.rank
    expected = output(unet, architecture)
    assert (expected - plain).abs().max() > 0.05

    layers = with_one_alpha({key: dataclasses.replace(lora, down=0.2 * lora.down) for key, lora in trained.items()})
    assert len({lora.alpha for lora in layers.values()}) == 1
    path = tmp_path / "trained.safetensors"
    metadata = lora_metadata("trained", dataclasses.replace(FACTS, architecture=architecture))
    write_lora(path, layers, metadata, dtype=torch.float32)

    pipeline = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[architecture]
    fresh = tiny_unet(architecture)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    state, alphas = pipeline.lora_state_dict(str(path), unet_config=fresh.config)
    pipeline.load_lora_into_unet(state, alphas, fresh)
    assert not [record.getMessage() for record in caplog.records if record.name.startswith(("diffusers", "peft"))]
    assert sum(hasattr(module, "lora_A") for module in fresh.modules()) == len(names)
    torch.testing.assert_close(output(fresh, architecture), expected, atol=1e-4, rtol=1e-4)
