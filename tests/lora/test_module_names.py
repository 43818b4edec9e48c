"""Names against the recorded lists of real networks, and against diffusers' own conversion of checkpoints."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
import torch

from spo.errors import SpoError
from spo.lora.module_names import (
    FILE_PREFIX,
    canonical_file_name,
    file_name,
    file_name_style,
    modules_by_file_name,
    to_diffusers,
    to_ldm,
)
from tests.tiny_networks import tiny_unet, weighted

LISTS = Path(__file__).parents[1] / "lora_names"


def recorded(architecture: str) -> list[dict[str, str]]:
    with (LISTS / f"{architecture}_attention.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def ldm_name(row: dict[str, str]) -> str:
    return row["ldm_module"] if "ldm_module" in row else row["sgm_module"]


@pytest.mark.parametrize(("architecture", "count"), [("sd15", 128), ("sdxl", 560)])
def test_recorded_attention_modules_get_their_recorded_file_names(architecture: str, count: int) -> None:
    rows = recorded(architecture)
    modules = [ldm_name(row) for row in rows]
    assert len(rows) == count
    assert [file_name(module, "ldm", architecture) for module in modules] == [row["file_name"] for row in rows]
    assert modules_by_file_name(modules, "ldm", architecture) == {row["file_name"]: ldm_name(row) for row in rows}


def test_recorded_diffusers_names_of_sd15() -> None:
    for row in recorded("sd15"):
        assert to_diffusers(row["ldm_module"]) == row["diffusers_module"]
        assert to_ldm(row["diffusers_module"]) == row["ldm_module"]
        assert file_name(row["diffusers_module"], "diffusers", "sd15") == row["file_name"]


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_diffusers_converts_a_checkpoint_in_our_ldm_names_to_its_own(architecture: str) -> None:
    unet = tiny_unet(architecture)
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = unet.state_dict()
    modules = {key.rpartition(".")[0] for key in state}
    checkpoint = {}
    for key in state:
        module, _, parameter = key.rpartition(".")
        checkpoint[f"model.diffusion_model.{to_ldm(module, modules)}.{parameter}"] = state[key]
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert len(checkpoint) == len(state)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_every_module_of_a_network_goes_to_ldm_and_back(architecture: str) -> None:
    modules = list(weighted(tiny_unet(architecture)))
    ldm = [to_ldm(module, modules) for module in modules]
    assert len(set(ldm)) == len(modules)
    assert [to_diffusers(name) for name in ldm] == modules
    assert [to_ldm(name) for name in ldm] == ldm
    assert [to_diffusers(name) for name in modules] == modules


@pytest.mark.parametrize(("architecture", "naming"), itertools.product(["sd15", "sdxl"], ["diffusers", "ldm"]))
def test_file_names_find_every_module_of_a_network(architecture: str, naming: str) -> None:
    modules = list(weighted(tiny_unet(architecture)))
    if naming == "ldm":
        modules = [to_ldm(module, modules) for module in modules]
    found = modules_by_file_name(modules, naming, architecture)
    assert sorted(found.values()) == sorted(modules)
    assert all(key.startswith(FILE_PREFIX) and "." not in key for key in found)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_both_namings_of_a_network_give_the_same_files(architecture: str) -> None:
    modules = list(weighted(tiny_unet(architecture)))
    ldm = [to_ldm(module, modules) for module in modules]
    assert set(modules_by_file_name(modules, "diffusers", architecture)) == set(
        modules_by_file_name(ldm, "ldm", architecture)
    )


@pytest.mark.parametrize("levels_with_attention", list(itertools.product([False, True], repeat=3)))
def test_an_upsampler_stands_behind_attention_where_there_is_some(levels_with_attention: tuple[bool, ...]) -> None:
    modules = [f"up_blocks.{level}.upsamplers.0.conv" for level in range(3)]
    attention = [
        f"up_blocks.{level}.attentions.2.proj_in" for level, there in enumerate(levels_with_attention) if there
    ]
    ldm = [to_ldm(module, modules + attention) for module in modules]
    assert ldm == [
        f"output_blocks.{3 * level + 2}.{2 if there else 1}.conv" for level, there in enumerate(levels_with_attention)
    ]
    assert [to_diffusers(name) for name in ldm] == modules


@pytest.mark.parametrize(
    ("ldm", "diffusers"),
    [
        ("input_blocks.0.0", "conv_in"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.4.0.skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("input_blocks.11.0.emb_layers.1", "down_blocks.3.resnets.1.time_emb_proj"),
        ("middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
        ("middle_block.1.transformer_blocks.9.ff.net.2", "mid_block.attentions.0.transformer_blocks.9.ff.net.2"),
        ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("output_blocks.11.0.in_layers.2", "up_blocks.3.resnets.2.conv1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("out.2", "conv_out"),
    ],
)
def test_names_of_stable_diffusion_checkpoints(ldm: str, diffusers: str) -> None:
    """As the public checkpoints name them; by hand, one of each kind."""
    assert to_diffusers(ldm) == diffusers
    underscored = FILE_PREFIX + ldm.replace(".", "_"), FILE_PREFIX + diffusers.replace(".", "_")
    assert [canonical_file_name(name, "sd15") for name in underscored] == [underscored[1]] * 2
    if ldm != "output_blocks.2.1.conv":  # SD1.5's; SDXL's stands behind attention
        assert [canonical_file_name(name, "sdxl") for name in underscored] == [underscored[0]] * 2


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_file_names_of_the_other_style_become_canonical(architecture: str) -> None:
    for row in recorded(architecture):
        ldm = ldm_name(row)
        for module in (ldm, to_diffusers(ldm)):
            assert canonical_file_name(FILE_PREFIX + module.replace(".", "_"), architecture) == row["file_name"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "down_blocks",
        "down_blocks.0",
        "down_blocks.0.resnets.2.conv1",
        "down_blocks.0.resnets.0.conv3",
        "down_blocks.0.motion_modules.0.proj_in",
        "down_blocks.0.downsamplers.0.op",
        "mid_block.attentions.1.proj_in",
        "up_blocks.0.resnets.3.conv1",
        "input_blocks.0.1.proj_in",
        "input_blocks.3.1.proj_in",
        "input_blocks.1.0.conv1",
        "middle_block.3.in_layers.2",
        "output_blocks.1.2.conv",
        "double_blocks.0.img_attn.qkv",
        "encoder.layers.0",
    ],
)
def test_other_names_are_no_modules_of_a_unet(name: str) -> None:
    for translate in (to_diffusers, to_ldm):
        with pytest.raises(SpoError, match=f'"{name}" is not a module'):
            translate(name)
    assert canonical_file_name(FILE_PREFIX + name.replace(".", "_"), "sd15") is None
    assert canonical_file_name(FILE_PREFIX + name.replace(".", "_"), "sdxl") is None


def test_style_of_file_names() -> None:
    assert file_name_style("lora_unet_out_2") == "ldm"
    assert file_name_style("lora_unet_output_blocks_0_1_proj_in") == "ldm"
    assert file_name_style("lora_unet_time_embedding_linear_1") == "diffusers"
    assert file_name_style("lora_unet_double_blocks_0_img_attn_qkv") is None
    assert file_name_style("lora_te_text_model_encoder_layers_0_mlp_fc1") is None


def test_wrong_words_are_named() -> None:
    with pytest.raises(SpoError, match='architecture "sd3".*sd15, sdxl'):
        file_name("conv_in", "diffusers", "sd3")
    with pytest.raises(SpoError, match='naming "kohya".*diffusers, ldm'):
        file_name("conv_in", "kohya", "sd15")
    with pytest.raises(SpoError, match='"conv_in" is not a module .* in ldm naming'):
        file_name("conv_in", "ldm", "sd15")


def test_modules_outside_the_unet_are_left_out_of_the_index() -> None:
    found = modules_by_file_name(["conv_in", "controlnet.conv_in"], "diffusers", "sd15")
    assert found == {"lora_unet_conv_in": "conv_in"}
