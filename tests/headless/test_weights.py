"""Weights from files into networks: all of them, in portions, as copies, in the wanted precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spo.checkpoint.tensor_file import open_tensor_file
from spo.errors import SpoError
from spo.headless import weights
from spo.headless.model import DiffusersModel
from spo.headless.weights import Source, ready
from tests.headless_models import assert_same_weights, load
from tests.tiny_checkpoints import tiny_sdxl, write_tiny_sd15

CPU = torch.device("cpu")


def test_weights_share_nothing_with_the_file(tmp_path: Path, sd15: DiffusersModel) -> None:
    """Portion after portion is mapped and copied: the file may be replaced while its network is in use."""
    path = write_tiny_sd15(tmp_path / "x.safetensors", dtype=torch.float32)
    model = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    expected = sd15.unet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.unet.state_dict().items())


def test_small_portions_give_the_same_network(
    sdxl_path: Path, sdxl: DiffusersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PORTION_BYTES", 20_000)
    model = load(sdxl_path)
    assert_same_weights(model, tiny_sdxl())


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


# ---- one small network


def small_network() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))


def source_of(folder: Path) -> tuple[Source, dict[str, torch.Tensor]]:
    """The small network's weights in two files, "net." before their names and something else beside them."""
    tensors = {
        "0.weight": torch.arange(6.0).reshape(3, 2),
        "0.bias": torch.ones(3),
        "1.weight": torch.full((1, 3), 900.0),
    }
    save_file({"net.0.weight": tensors["0.weight"], "other": torch.zeros(9)}, folder / "1.safetensors")
    save_file({f"net.{name}": tensors[name] for name in ("0.bias", "1.weight")}, folder / "2.safetensors")
    files = [open_tensor_file(folder / f"{number}.safetensors") for number in (1, 2)]
    return Source(files, "net.", lambda named: {name[4:]: tensor for name, tensor in named.items()}), tensors


def test_shards_fill_a_network_in_the_wanted_precision(tmp_path: Path) -> None:
    source, tensors = source_of(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in source.converted().items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    network = small_network()
    source.check(network, "small network")
    source.fill(network, CPU, torch.bfloat16)
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in tensors.items())


def test_a_part_of_a_network_can_be_filled_alone(tmp_path: Path) -> None:
    source, tensors = source_of(tmp_path)
    network = small_network()
    source.fill(network, CPU, torch.float32, only=("1.",))
    assert network[0].weight.is_meta and torch.equal(network[1].weight, tensors["1.weight"])
    source.fill(network, CPU, torch.float32, only=("0.",))
    assert torch.equal(network[0].weight, tensors["0.weight"])


def test_float8_takes_the_named_weights_and_clamps_them(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path)
    network = small_network()
    source.fill(network, CPU, torch.float32, in_float8={"1.weight"})
    assert network[1].weight.dtype == torch.float8_e4m3fn and network[0].weight.dtype == torch.float32
    assert network[1].weight.float().tolist() == [[448.0] * 3]  # the largest that float8 e4m3 has; 900 would be nan


def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    source, _ = source_of(tmp_path)
    with pytest.raises(SpoError, match="The small network is incomplete: 1 tensors are missing, such as 1.weight"):
        Source(source.files, "net.0", source.convert).check(small_network(), "small network")
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4, bias=False))
    with pytest.raises(SpoError, match=r"does not fit: 1.weight has the shape \[1, 3\] where \[4, 3\] is expected"):
        source.check(other, "small network")


def test_ready_freezes_and_counts_positions_that_no_file_holds() -> None:
    network = small_network().train()
    network[0].register_buffer("position_ids", torch.empty(1, 5, device="meta"))
    network[1].to_empty(device=CPU)
    assert ready(network, CPU) is network
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert network[0].position_ids.tolist() == [[0, 1, 2, 3, 4]]
