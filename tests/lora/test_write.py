"""LoRA files are written whole, read back, or refused; and diffusers gives the output that training had."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from spo.errors import SpoError
from spo.lora import write
from spo.lora.describe import describe
from spo.lora.layer import LoraLayer, with_one_alpha
from spo.lora.metadata import lora_metadata
from spo.lora.read import read_lora
from spo.lora.write import write_lora
from tests.loras import FACTS, SD15_QUERY, folder_names, layer, loras_for, two_layers
from tests.tiny_networks import output, tiny_unet, weighted


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
    really_verify = write._verify

    def someone_is_faster(*arguments: Any) -> None:
        really_verify(*arguments)
        path.write_bytes(b"precious")

    monkeypatch.setattr(write, "_verify", someone_is_faster)
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
