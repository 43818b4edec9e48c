"""LoRA files in every spelling are read, matched with a network, or refused with what they are instead."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spo.errors import SpoError
from spo.lora.layer import LoraLayer
from spo.lora.metadata import lora_metadata
from spo.lora.module_names import file_name, to_ldm
from spo.lora.read import LoraFile, check_matches, read_lora
from spo.lora.write import write_lora
from tests.loras import FACTS, QUERY, SD15_QUERY, SDXL_QUERY, Q, kohya, layer, loras_for, save, two_layers
from tests.tiny_networks import tiny_unet, weighted

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
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"],
         "an SD 1.x checkpoint with 2 input channels"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a UNet alone"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"], "a VAE"),
        (["text_model.embeddings.token_embedding.weight", "text_model.a", "text_model.b"], "a text encoder alone"),
        (["double_blocks.0.img_attn.qkv.weight", "final_layer.x", "img_in.x"], "a Flux checkpoint"),
        (["control_model.input_blocks.0.0.weight", "control_model.x", "control_model.y"], "a ControlNet"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight", "image_proj.norm.weight"], "an IP-Adapter"),
        (["emb_params"], "a textual inversion embedding"),
        (["clip_l", "clip_g"], "a textual inversion embedding"),
        (["<cat>"], "a textual inversion embedding"),
        (["768.0.linear.0.weight", "768.1.linear.0.weight", "320.0.linear.0.weight"], "a hypernetwork"),
        (["alpha.beta", "gamma", "delta"], "something else .its first tensors: alpha.beta, delta, gamma"),
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
        ({"state_dict": {"model.diffusion_model.out.2.weight": torch.ones(1)}}, "a checkpoint"),
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


class PackedLinear(nn.Module):
    """A linear layer that is not torch's, with its weight packed."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(in_features * out_features // 2, 1))


def test_a_linear_layer_need_not_be_torch_s() -> None:
    network = Network()
    network.mid_block.attentions[0].proj_in = PackedLinear(4, 6)
    file = read("sd15", {"lora_unet_mid_block_attentions_0_proj_in": layer(shape=(6, 4))})
    assert check_matches(file, network, "diffusers", "sd15")["mid_block.attentions.0.proj_in"].weight_shape == (6, 4)
