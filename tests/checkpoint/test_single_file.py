"""Checkpoints told from their headers: full-size SD1.5 and SDXL (sparse files), hints, and every refusal."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from spo.checkpoint.single_file import (
    describe,
    file_sha256,
    inspect_checkpoint,
    short_hash,
)
from spo.checkpoint.tensor_file import TensorFile, open_tensor_file, read_tensors
from spo.errors import SpoError
from tests.tiny_checkpoints import (
    clip_tensors,
    ldm_unet_tensors,
    ldm_vae_tensors,
    open_clip_tensors,
    tiny_sd15,
    write_diffusers_folder,
    write_tiny_sd15,
    write_tiny_sdxl,
)

HERE = Path(__file__).parents[1]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
BYTES = {"F32": 4, "F16": 2, "I64": 8, "BF16": 2}
Shapes = dict[str, tuple[int, ...]]


def craft(path: Path, shapes: Shapes, *, dtype: str = "F16", metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of zeros: a real header, and a hole of the right size after it."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count * BYTES[dtype]]}
        end += count * BYTES[dtype]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


def shapes_of(path: Path) -> Shapes:
    return {name: entry.shape for name, entry in open_tensor_file(path).tensors.items()}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd15(tmp_path_factory.mktemp("sd15") / "tiny.safetensors")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "tiny.safetensors")


# ---- full-size checkpoints. The networks' configurations and weight counts are the published ones.


def full_size_shapes(architecture: str) -> Shapes:
    """Every tensor of a full single file; networks on the meta device take no memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    narrow = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    wide = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    xl_unet = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(xl_unet if architecture == "sdxl" else {"cross_attention_dim": 768}))
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        first = CLIPTextModel(CLIPTextConfig(**narrow))
        tensors = {**ldm_unet_tensors(unet), **ldm_vae_tensors(vae)}
        if architecture == "sdxl":
            second = CLIPTextModelWithProjection(CLIPTextConfig(**wide, projection_dim=1280))
            tensors |= clip_tensors(first, "conditioner.embedders.0.transformer.text_model.")
            tensors |= open_clip_tensors(second, "conditioner.embedders.1.model.")
        else:
            tensors |= clip_tensors(first, "cond_stage_model.transformer.text_model.")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if "position_ids" not in name}


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
    from spo.headless import model as diffusers_host
    from spo.headless.model import load_model

    def unread(file: TensorFile, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: torch.empty(file.tensors[name].shape, dtype=torch.float16, device="meta") for name in names}

    monkeypatch.setattr(diffusers_host, "read_tensors", unread)
    for architecture in ("sd15", "sdxl"):
        path = craft(tmp_path / f"{architecture}.safetensors", full_size_shapes(architecture))
        model = load_model(path, device="meta", dtype=torch.float16, vae_dtype=torch.float16)
        assert model.memory_bytes() == pytest.approx(path.stat().st_size, rel=0.001)
    assert [b.attentions[0].transformer_blocks[0].attn1.heads for b in model.unet.down_blocks[1:]] == [10, 20]
    assert len(model.unet.mid_block.attentions[0].transformer_blocks) == 10


# ---- small checkpoints and hints


def test_tiny_checkpoints(sd15: Path, sdxl: Path) -> None:
    info = inspect_checkpoint(sd15)
    assert (info.unet.channels, info.unet.depths, info.unet.res_blocks) == ((32, 32, 64, 64), (1, 1, 1, 0), 1)
    assert info.parameters == info.unet_parameters + info.vae_parameters + info.text_parameters > 1e6
    assert not info.zero_terminal_snr and info.config_path is None
    info = inspect_checkpoint(str(sdxl))
    assert (info.architecture, info.unet.heads, len(info.text_encoders)) == ("sdxl", (1, 1, 1), 2)


def test_other_widths_and_levels(tmp_path: Path) -> None:
    path = write_tiny_sd15(
        tmp_path / "a.safetensors", channels=(64, 96), depths=(1, 2), res_blocks=2, heads=4, linear=True, text_width=64,
        vae_channels=(32, 32, 64), vae_blocks=2,
    )  # fmt: skip
    info = inspect_checkpoint(path)
    assert (info.unet.channels, info.unet.depths, info.unet.middle_depth) == ((64, 96), (1, 2), 2)
    assert info.unet.linear_projection and info.unet.context_width == 64
    assert info.vae is not None and (info.vae.downscale, info.vae.res_blocks) == (4, 2)


def test_nothing_heavy_is_imported(sd15: Path) -> None:
    code = f"""
    import sys
    from spo.checkpoint.single_file import describe, inspect_checkpoint
    describe(inspect_checkpoint({str(sd15)!r}))
    assert not {{"torch", "diffusers", "transformers", "safetensors"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=HERE.parent)


def test_pickle_equals_safetensors(tmp_path: Path, sd15: Path) -> None:
    path = write_tiny_sd15(tmp_path / "tiny.ckpt")
    expected = inspect_checkpoint(sd15)
    info = inspect_checkpoint(path)
    same = dataclasses.replace(expected, path=path, size_bytes=info.size_bytes)
    assert info == same
    name = f"{UNET}out.2.weight"
    (tensor,) = read_tensors(open_tensor_file(path), [name]).values()
    assert torch.equal(tensor, read_tensors(open_tensor_file(sd15), [name])[name])


def test_old_pickle_format_and_name_without_ending(tmp_path: Path) -> None:
    names = shapes_of(write_tiny_sd15(tmp_path / "a.safetensors"))
    tensors = {name: torch.zeros(shape) for name, shape in names.items() if "token_embedding" not in name}
    torch.save(tensors, str(tmp_path / "old"), _use_new_zipfile_serialization=False)
    assert inspect_checkpoint(tmp_path / "old").text_encoders == ()


def test_missing_vae_and_text_encoders_are_told(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "bare.safetensors", leave_out=(VAE, "cond_stage_model."))
    info = inspect_checkpoint(path)
    assert info.vae is None and info.text_encoders == ()
    assert sum("not in the file" in line for line in describe(info)) == 2


def test_text_encoder_names_without_text_model(tmp_path: Path, sd15: Path) -> None:
    shapes = {name.replace(".text_model", ""): shape for name, shape in shapes_of(sd15).items()}
    assert inspect_checkpoint(craft(tmp_path / "old.safetensors", shapes)).text_encoders[0].layers == 3


SGM_V = "denoiser_config: {params: {scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling}}}"
SGM_EPS = SGM_V.replace("VScaling", "EpsScaling")


@pytest.mark.parametrize(
    ("metadata", "marker", "params", "argument", "expected"),
    [
        ({}, False, None, None, "epsilon"),
        ({"modelspec.prediction_type": "v"}, False, None, None, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, True, None, None, "epsilon"),
        ({}, True, None, None, "v_prediction"),
        ({}, True, None, "epsilon", "epsilon"),
        ({}, False, "parameterization: v", None, "v_prediction"),
        ({"modelspec.prediction_type": "v"}, False, "parameterization: eps", None, "epsilon"),
        ({}, False, SGM_V, None, "v_prediction"),
        ({}, True, SGM_EPS, None, "epsilon"),
        ({}, False, "scale_factor: 0.2", "v_prediction", "v_prediction"),
    ],
)
def test_prediction_type(
    tmp_path: Path, sd15: Path, metadata: dict[str, str], marker: bool, params: str | None, argument: str | None,
    expected: str,
) -> None:  # fmt: skip
    shapes = shapes_of(sd15) | ({"v_pred": (0,), "ztsnr": (0,)} if marker else {})
    path = craft(tmp_path / "x.safetensors", shapes, metadata=metadata)
    if params:
        (tmp_path / "x.yaml").write_text(f"model: {{params: {{{params}}}}}" if "{" in params else
                                         f"model:\n  params:\n    {params}\n")  # fmt: skip
    info = inspect_checkpoint(path, prediction_type=argument)
    assert info.prediction_type == expected
    assert info.zero_terminal_snr == marker
    assert info.scale_factor == (0.2 if params and "scale" in params else 0.18215)


def test_v_prediction_of_the_tiny_writer(tmp_path: Path) -> None:
    for ending in ("safetensors", "ckpt"):
        path = write_tiny_sd15(tmp_path / f"v.{ending}", prediction_type="v_prediction")
        assert inspect_checkpoint(path).prediction_type == "v_prediction"


def test_unknown_prediction_words(tmp_path: Path, sd15: Path) -> None:
    with pytest.raises(SpoError, match='prediction type "v_predictoin" is not known, did you mean "v_prediction"'):
        inspect_checkpoint(sd15, prediction_type="v_predictoin")
    path = craft(tmp_path / "s.safetensors", shapes_of(sd15), metadata={"modelspec.prediction_type": "sample"})
    with pytest.raises(SpoError, match='modelspec.prediction_type in s.safetensors "sample" is not known'):
        inspect_checkpoint(path)


def test_heads_from_yaml(tmp_path: Path, sd15: Path, sdxl: Path) -> None:
    config = tmp_path / "any.yaml"
    config.write_text("model: {params: {unet_config: {params: {num_heads: 4, num_head_channels: -1}}}}")
    assert inspect_checkpoint(sd15, config_path=config).unet.heads == (4, 4, 4, 4)
    assert inspect_checkpoint(sd15, config_path=config).config_path == config
    config.write_text("model: {params: {network_config: {params: {num_head_channels: 16}}}}")
    assert inspect_checkpoint(sdxl, config_path=config).unet.heads == (2, 4, 4)
    config.write_text("model: {params: {unet_config: {params: {num_heads: 5}}}}")
    with pytest.raises(SpoError, match="32 channels in level 0, which do not divide into 5 heads: say num_heads"):
        inspect_checkpoint(sd15, config_path=config)
    with pytest.raises(SpoError, match="there is no configuration file"):
        inspect_checkpoint(sd15, config_path=tmp_path / "none.yaml")
    for text, message in {"a: [": "not a readable yaml", "a: 1": "no model.params",
                          "model: {params: {scale_factor: [1]}}": "value of the wrong kind"}.items():  # fmt: skip
        config.write_text(text)
        with pytest.raises(SpoError, match=message):
            inspect_checkpoint(sd15, config_path=config)


def test_the_bundled_webui_yaml_layout(tmp_path: Path, sd15: Path) -> None:
    """As LDM's own v1-inference.yaml: numbers, a hub name as the encoder's version (ignored), eps by default."""
    text = """
    model:
      target: ldm.models.diffusion.ddpm.LatentDiffusion
      params:
        linear_start: 0.0009
        linear_end: 0.0130
        scale_factor: 0.19
        unet_config:
          target: ldm.modules.diffusionmodules.openaimodel.UNetModel
          params: {num_heads: 8, context_dim: 768}
        cond_stage_config:
          target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
          params: {version: openai/clip-vit-large-patch14}
    """
    path = craft(tmp_path / "x.safetensors", shapes_of(sd15))
    path.with_suffix(".yaml").write_text(textwrap.dedent(text))
    info = inspect_checkpoint(path)
    assert (info.scale_factor, info.schedule.beta_start, info.schedule.beta_end) == (0.19, 0.0009, 0.013)


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


def test_describe(sd15: Path, sdxl: Path) -> None:
    lines = describe(inspect_checkpoint(sd15))
    text = "\n".join(lines)
    for words in ("tiny.safetensors", "single file", "F16", "Stable Diffusion 1.x (sd15)", "epsilon", "32 x 1 (8 head",
                  "clip 32 wide, 3 layers, 1 heads", "scale factor 0.18215"):  # fmt: skip
        assert words in text
    assert all(len(line) < 200 for line in lines)
    assert "open_clip 32 wide" in "\n".join(describe(inspect_checkpoint(sdxl)))


def test_hash(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()
    assert short_hash(path) == hashlib.sha256(content).hexdigest()[:10]
    with pytest.raises(SpoError, match="cannot be read"):
        short_hash(tmp_path / "none")


# ---- refusals: other kinds of files


def refused(path: Path, message: str) -> None:
    with pytest.raises(SpoError) as caught:
        inspect_checkpoint(path)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_missing_file_and_special_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "there is no file")
    refused(Path("/dev/null"), "is not a file")


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


ONE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: it has only 0 bytes"),
        (b"abc", "truncated: it has only 3 bytes"),
        (with_header(ONE, b"1234567"), "truncated: its header lists 70 bytes, the file has 69"),
        (with_header(ONE)[:-20], "truncated: its header alone has 62 bytes, the file 42"),
        (with_header(ONE, b"123456789"), "damaged"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "is a web page"),
        (b"\n\n <html lang=en>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
        (b"just some text that is long enough", "is a text file"),
        (with_header(b"{not json}"), "not a safetensors file"),
        (with_header(b'{"a":3}'), "not a safetensors file"),
        (with_header(b'{"a":{"dtype":"F32"}}'), "not a safetensors file"),
        (b"PK\x03\x04" + bytes(100), "a torch checkpoint under a wrong name: rename it to .ckpt"),
        (b"\x80\x02" + bytes(100), "rename it to .ckpt"),
    ],
)
def test_not_a_tensor_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refused(path, message)


class NotATensor:
    """Stands for the callbacks that old checkpoints carry."""


def test_pickles_with_other_things(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": NotATensor()}, str(tmp_path / "callbacks.ckpt"))
    refused(tmp_path / "callbacks.ckpt", "holds more than tensors.*convert it to .safetensors")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"a": NotATensor()}))
    refused(tmp_path / "plain.ckpt", "pickle|torch checkpoint")
    torch.save({"epoch": 3, "names": ["a"]}, str(tmp_path / "empty.pt"))
    refused(tmp_path / "empty.pt", "without named tensors")
    torch.save([torch.zeros(1)], str(tmp_path / "list.pt"))
    refused(tmp_path / "list.pt", "without named tensors")
    torch.save({"string_to_param": {"*": torch.zeros(1, 768)}, "name": "x"}, str(tmp_path / "word.pt"))
    refused(tmp_path / "word.pt", "textual inversion")
    whole = write_tiny_sd15(tmp_path / "whole.ckpt")
    half = whole.read_bytes()[: whole.stat().st_size // 2]
    for content in (half, b"PK\x03\x04" + bytes(99), b"\x80\x02" + bytes(99)):
        (tmp_path / "half.ckpt").write_bytes(content)
        refused(tmp_path / "half.ckpt", "truncated, damaged|pickle that holds more")


def attention(context: int) -> Shapes:
    return {f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, context)}


def stem(channels: int = 4) -> Shapes:
    return {f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3)}


LABEL: Shapes = {f"{UNET}label_emb.0.0.weight": (1280, 2816)}
OPEN_CLIP_1: Shapes = {"conditioner.embedders.1.model.ln_final.weight": (1280,)}

OTHER_KINDS: dict[str, tuple[Shapes, str]] = {
    "kohya lora": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "is a LoRA"),
    "diffusers lora": ({"unet.down_blocks.1.attn1.to_q.lora_A.weight": (4, 640)}, "is a LoRA"),
    "old diffusers lora": ({"unet.mid_block.attn1.processor.to_q_lora.down.weight": (4, 640)}, "is a LoRA"),
    "loha": ({"lora_unet_x.hada_w1_a": (4, 4)}, "is a LoRA"),
    "lokr": ({"lycoris_unet_x.lokr_w1": (4, 4)}, "is a LoRA"),
    "embedding": ({"emb_params": (8, 768)}, "textual inversion"),
    "sdxl embedding": ({"clip_l": (8, 768), "clip_g": (8, 1280)}, "textual inversion"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "ControlNet"),
    "diffusers controlnet": ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "ControlNet"),
    "sd3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "Stable Diffusion 3"),
    "flux": ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (8, 8)}, "Flux"),
    "flux network alone": ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "Flux"),
    "other network": ({f"{UNET}blocks.0.attn.weight": (8, 8)}, "another kind of diffusion network"),
    "unet alone": ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a UNet alone"),
    "diffusers unet": ({"conv_in.weight": (3,), "down_blocks.0.resnets.0.conv1.weight": (3,)}, "a UNet alone"),
    "vae": ({"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (512, 4, 3, 3)}, "is a VAE"),
    "vae with prefix": ({f"{VAE}encoder.conv_in.weight": (128, 3, 3, 3)}, "is a VAE"),
    "clip": ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "text encoder alone"),
    "open clip": ({"transformer.resblocks.0.ln_1.weight": (1280,)}, "text encoder alone"),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}, "text encoder alone"),
    "upscaler": ({"conv_first.weight": (64, 3, 3, 3), "conv_body.weight": (64,)}, "tensors: conv_first.weight, conv_"),
    "nothing": ({}, "its first tensors: none"),
    "sd2": (stem() | attention(1024), r"Stable Diffusion 2\.x checkpoint"),
    "sd2 by encoder": (stem() | {"cond_stage_model.model.ln_final.weight": (1024,)}, r"Diffusion 2\.x checkpoint"),
    "sd2 inpainting": (stem(9) | attention(1024), r"2\.x inpainting"),
    "sd2 depth": (stem(5) | attention(1024), r"2\.x depth"),
    "sd2 upscaler": (stem(7) | attention(1024), r"2\.x upscaler"),
    "sd2 unclip": (stem() | LABEL | {"embedder.model.ln_final.weight": (768,)}, r"2\.1 unCLIP"),
    "inpainting": (stem(9) | attention(768), "SD 1.x inpainting checkpoint .9 input channels"),
    "pix2pix": (stem(8) | attention(768), "SD 1.x instruct-pix2pix checkpoint .8 input channels"),
    "sdxl inpainting": (stem(9) | LABEL | attention(2048) | OPEN_CLIP_1, "SDXL inpainting"),
    "sdxl pix2pix": (stem(8) | LABEL | attention(2048) | OPEN_CLIP_1, "SDXL instruct-pix2pix"),
    "refiner": (stem() | LABEL | {"conditioner.embedders.0.model.ln_final.weight": (1280,)}, "SDXL refiner"),
    "refiner unet": (stem() | LABEL | attention(1280), "SDXL refiner"),
    "playground": (stem() | LABEL | attention(2048) | {"edm_mean": (4,)}, "EDM preconditioning"),
    "video": (stem(8) | LABEL | {f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight": (320,)}, "video"),
    "alt": (stem() | attention(768) | {"cond_stage_model.roberta.pooler.dense.weight": (8, 8)}, "AltDiffusion"),
    "three channels": (stem(3) | attention(768), "3 input channels; text-to-image checkpoints have 4"),
    "unconditional": (stem(), "without cross-attention"),
    "cut off": (stem() | attention(768), "irregular|incomplete"),
    "flat": ({f"{UNET}input_blocks.0.0.weight": (320,)} | attention(768), r"damaged: the tensor .* shape \[320\]"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds(tmp_path: Path, kind: str) -> None:
    shapes, message = OTHER_KINDS[kind]
    refused(craft(tmp_path / "x.safetensors", shapes), message)


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


# ---- diffusers folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_diffusers_folder(tmp_path / "model", tiny_sd15())


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


def test_folder(folder: Path, sd15: Path) -> None:
    info, expected = inspect_checkpoint(folder), inspect_checkpoint(sd15)
    assert info.is_folder and info.prediction_source == "from the scheduler's configuration"
    assert (info.unet, info.vae, info.scale_factor) == (expected.unet, expected.vae, expected.scale_factor)
    assert (info.unet_parameters, info.vae_parameters) == (expected.unet_parameters, expected.vae_parameters)
    assert info.text_encoders == expected.text_encoders and info.schedule == expected.schedule
    assert "diffusers folder" in describe(info)[1]
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    info = inspect_checkpoint(folder)
    assert info.prediction_type == "v_prediction" and info.zero_terminal_snr
    assert inspect_checkpoint(folder, prediction_type="epsilon").prediction_type == "epsilon"


def test_folder_with_parts_missing(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(folder / "unet" / "kept")
    with pytest.raises(SpoError, match=r'unet" has a config.json but no weights'):
        inspect_checkpoint(folder)
    (folder / "unet" / "kept").rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert inspect_checkpoint(folder).unet_parameters > 0
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(SpoError, match=r'vae" has no config.json'):
        inspect_checkpoint(folder)
    (folder / "vae").rename(folder / "other")
    (folder / "text_encoder").rename(folder / "other2")
    refused(folder, "diffusers folder without vae/ and text_encoder/")
    with pytest.raises(SpoError, match="brings its own configuration"):
        inspect_checkpoint(folder, config_path=folder / "x.yaml")


def test_folders_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    config = folder / "unet" / "config.json"
    kept = config.read_text()
    for values, message in (
        ({"cross_attention_dim": 1024}, "Stable Diffusion 2.x"),
        ({"in_channels": 9}, "SD 1.x inpainting checkpoint .9"),
        ({"in_channels": 8}, "instruct-pix2pix"),
        ({"in_channels": 5}, "a special checkpoint .5"),
        ({"addition_embed_type": "text_time", "cross_attention_dim": 1280}, "SDXL refiner"),
        ({"addition_embed_type": "text_time"}, "without text_encoder_2/"),
        ({"block_out_channels": None}, "incomplete or damaged configuration"),
    ):
        change(config, **values)
        refused(folder, message)
        config.write_text(kept)
    config.write_text("{")
    with pytest.raises(SpoError, match="not a readable JSON file"):
        inspect_checkpoint(folder)
    for name in ("StableDiffusion3Pipeline", "FluxPipeline"):
        change(folder / "model_index.json", _class_name=name)
        refused(folder, f"for {name}; only SD 1.x and SDXL")
    (tmp_path / "models").mkdir()
    refused(tmp_path / "models", "without unet/")
    (tmp_path / "models" / "a.safetensors").write_bytes(b"")
    refused(tmp_path / "models", "give one of its files, such as .*a.safetensors")
