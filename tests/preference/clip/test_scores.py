"""PickScore, HPS and aesthetic scores against transformers, OpenCLIP and PIL."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from spo.algorithm.preference import Candidates
from spo.checkpoint.tensor_file import open_tensor_file
from spo.errors import SpoError
from spo.preference.clip.scores import (
    AestheticScore,
    ClipScore,
    clip_tensors,
    longer_side,
    read_aesthetic_score,
    read_clip,
    read_clip_score,
    shorter_side,
    weights_in,
)
from spo.preference.clip.towers import CLIP_MEAN, CLIP_STD, token_ids
from spo.preference.load import NO_TIME, load
from spo.preference.placement import ON_CPU, placement
from tests.conftest import relative_error

PROMPTS = ["a red house", "", "a red house"]


def opened(path):
    """The index of a file, or of the weights in a folder."""
    return open_tensor_file(weights_in(path))


def pool_of(pictures):
    """[K, B, 3, H, W] pictures as a pool whose decoder returns them."""
    latents = torch.zeros(*pictures.shape[:2], 4, 8, 8)
    return Candidates(latents, 1.0, 201.0, latents, lambda flat: pictures.flatten(0, 1))


def transformers_clip(activation="gelu", projection=20):
    """A small random CLIPModel of transformers."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"intermediate_size": 96, "num_hidden_layers": 2, "hidden_act": activation}
    config = CLIPConfig(
        text_config={"hidden_size": 32, "num_attention_heads": 2, "eos_token_id": 49407, **sizes},
        vision_config={"hidden_size": 48, "num_attention_heads": 3, "image_size": 28, "patch_size": 14, **sizes},
        projection_dim=projection,
    )
    clip = CLIPModel(config).eval()
    for parameter in clip.parameters():
        nn.init.normal_(parameter, std=0.3)
    return clip


def save_folder(clip, folder):
    """As `save_pretrained` lays it out: weights and config.json."""
    folder.mkdir(exist_ok=True)
    tensors = {name: value.contiguous().clone() for name, value in clip.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(clip.config.to_dict()))
    return folder


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory):
    """A small model of OpenCLIP itself, its checkpoint laid out like HPS's, and the model."""
    open_clip = pytest.importorskip("open_clip", reason="OpenCLIP is part of the WebUI's world only")
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 128, "head_width": 64, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
    }
    (folder / "spo-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "spo-tiny.json")
    torch.manual_seed(1)
    model = open_clip.create_model("spo-tiny").eval()
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            nn.init.normal_(parameter, std=0.1)
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, path)
    return path, model


# ---- the networks


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_equals_transformers(tmp_path, activation):
    clip = transformers_clip(activation)
    model = read_clip_score(opened(save_folder(clip, tmp_path / "PickScore_v1")), "PickScore_v1", ON_CPU)
    assert model.name == "PickScore_v1" and model.needs_pixels
    pictures = torch.rand(2, 3, 3, 40, 32) * 2 - 1
    with torch.no_grad():
        answer = clip(input_ids=token_ids(PROMPTS), pixel_values=shorter_side(pictures.flatten(0, 1), 28))
    expected = torch.stack([answer.logits_per_image[k * 3 : k * 3 + 3].diagonal() for k in range(2)])
    scores = model.score(pool_of(pictures), PROMPTS)
    assert scores.shape == (2, 3) and scores.dtype == torch.float32
    assert relative_error(scores, expected) < 1e-5


def test_equals_open_clip(open_clip_file):
    from open_clip import tokenize  # which pads with zeros

    path, theirs = open_clip_file
    model = read_clip_score(opened(path), "hps", ON_CPU)
    pictures = torch.rand(2, 3, 3, 40, 32) * 2 - 1
    prepared = longer_side(pictures.flatten(0, 1), 28)
    ids = token_ids(PROMPTS)
    with torch.no_grad():
        image = theirs.encode_image(prepared, normalize=True)
        text = theirs.encode_text(tokenize(PROMPTS), normalize=True)
        expected = theirs.logit_scale.exp() * (image.unflatten(0, (2, 3)) * text).sum(-1)
    assert relative_error(model.clip.image_features(prepared), image) < 1e-5
    assert relative_error(model.clip.text_features(ids), text) < 1e-5
    assert relative_error(model.score(pool_of(pictures), PROMPTS), expected) < 1e-5


def open_clip_layout(clip):
    """transformers' tensors under OpenCLIP's names, written out by hand."""
    old, new = clip.state_dict(), {"logit_scale": clip.logit_scale.detach()}
    tops = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    }
    new |= {theirs: old[ours] for theirs, ours in tops.items()}
    new |= {"text_projection": old["text_projection.weight"].T, "visual.proj": old["visual_projection.weight"].T}
    for kind in ("weight", "bias"):
        new[f"ln_final.{kind}"] = old[f"text_model.final_layer_norm.{kind}"]
        new[f"visual.ln_pre.{kind}"] = old[f"vision_model.pre_layrnorm.{kind}"]
        new[f"visual.ln_post.{kind}"] = old[f"vision_model.post_layernorm.{kind}"]
        for theirs, ours in (("transformer", "text_model"), ("visual.transformer", "vision_model")):
            for n in range(2):
                a, b = f"{theirs}.resblocks.{n}", f"{ours}.encoder.layers.{n}"
                new[f"{a}.attn.in_proj_{kind}"] = torch.cat([old[f"{b}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
                new[f"{a}.attn.out_proj.{kind}"] = old[f"{b}.self_attn.out_proj.{kind}"]
                new[f"{a}.ln_1.{kind}"], new[f"{a}.ln_2.{kind}"] = (old[f"{b}.layer_norm{i}.{kind}"] for i in (1, 2))
                new[f"{a}.mlp.c_fc.{kind}"], new[f"{a}.mlp.c_proj.{kind}"] = (
                    old[f"{b}.mlp.fc{i}.{kind}"] for i in (1, 2)
                )
    return {name: value.contiguous().clone() for name, value in new.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_open_clip_names_carry_the_same_tensors(tmp_path, prefix):
    clip = transformers_clip()
    renamed = {f"{prefix}{name}": value for name, value in open_clip_layout(clip).items()}
    torch.save({"state_dict": renamed, "epoch": 1}, tmp_path / "hps.pt")
    found = clip_tensors(open_tensor_file(tmp_path / "hps.pt"))
    expected = {name: value for name, value in clip.state_dict().items() if not name.endswith("position_ids")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_bfloat16_stays_close(tmp_path):
    folder = save_folder(transformers_clip(), tmp_path / "clip")
    pictures = torch.rand(2, 3, 3, 28, 28) * 2 - 1
    exact, coarse = (
        read_clip_score(opened(folder), "clip", placement("cpu", precision)).score(pool_of(pictures), PROMPTS)
        for precision in ("float32", "bfloat16")
    )
    assert relative_error(coarse, exact) < 0.05


# ---- preparing pictures


def as_pil(picture):
    return Image.fromarray(((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def unnormalized(prepared):
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return prepared * std + mean


def smooth(height, width):
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    return torch.stack([(y + x).sin(), (y * x / 4).cos(), (y - 2 * x).sin()])


def noise(height, width):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("make", "allowed"), [(smooth, 0.01), (noise, 0.02)])
@pytest.mark.parametrize(("height", "width"), [(512, 512), (768, 512), (512, 904)])
def test_prepared_as_pil_does(make, allowed, height, width):
    """What PickScore's and OpenAI's preprocessing do with the 8-bit picture; the largest difference of 0 ... 1."""
    picture = make(height, width)
    short = min(height, width)
    size = (224 * width // short, 224 * height // short)
    resized = np.asarray(as_pil(picture).resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
    top, left = (size[1] - 224) // 2, (size[0] - 224) // 2
    expected = torch.from_numpy(resized[top : top + 224, left : left + 224].copy()).permute(2, 0, 1)
    difference = (unnormalized(shorter_side(picture[None], 224)[0]) - expected).abs()
    assert difference.max() < allowed and difference.mean() < 0.002


def test_prepared_as_transformers_does():
    processing = pytest.importorskip("transformers").CLIPImageProcessor()
    picture = smooth(600, 512)
    expected = torch.as_tensor(np.array(processing(as_pil(picture), return_tensors="np")["pixel_values"][0]))
    assert (shorter_side(picture[None], 224)[0] - expected).abs().max() < 0.01 / min(CLIP_STD)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (768, 512), (512, 904)])
def test_hps_sees_the_whole_picture_on_black(height, width):
    prepared = unnormalized(longer_side(torch.ones(1, 3, height, width), 224))[0]
    inside = prepared[0] > 0.5
    assert prepared.shape == (3, 224, 224)
    assert int(inside.any(1).sum()) == round(224 * height / max(height, width))
    assert int(inside.any(0).sum()) == round(224 * width / max(height, width))
    assert torch.allclose(prepared[:, ~inside], torch.zeros(1), atol=1e-6)


# ---- aesthetic scores


def head_of(kind, width):
    if kind == "linear":
        return nn.Linear(width, 1)
    layers = nn.Sequential(
        nn.Linear(width, 16), nn.Dropout(0.2), nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Linear(4, 1)
    )
    return nn.ModuleDict({"layers": layers})


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_aesthetic_scores(tmp_path, kind):
    clip = transformers_clip("quick_gelu")
    folder = save_folder(clip, tmp_path / "clip-vit-large-patch14")
    head = head_of(kind, 20).eval()
    torch.save(head.state_dict(), tmp_path / "sac+logos.pth")
    with pytest.warns(UserWarning, match="does not know the timestep"):
        model = load(tmp_path / "sac+logos.pth")
    assert isinstance(model, AestheticScore)
    pictures = torch.rand(2, 3, 3, 28, 28) * 2 - 1
    with torch.no_grad():
        pixels = shorter_side(pictures.flatten(0, 1), 28)
        features = clip(input_ids=token_ids([""]), pixel_values=pixels).image_embeds
        expected = (head if kind == "linear" else head["layers"])(features)[:, 0].unflatten(0, (2, 3))
    assert relative_error(model.score(pool_of(pictures), PROMPTS), expected) < 1e-5
    head_file = opened(tmp_path / "sac+logos.pth")
    elsewhere = read_aesthetic_score(head_file, "sac", ON_CPU, clip_path=folder / "model.safetensors")
    assert torch.equal(elsewhere.score(pool_of(pictures), PROMPTS), model.score(pool_of(pictures), PROMPTS))


def test_the_clip_of_an_aesthetic_head_is_quick_gelu_without_a_word(tmp_path):
    clip = transformers_clip("quick_gelu")
    tensors = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_file(tensors, tmp_path / "clip.safetensors", {"clip_config": json.dumps(clip.config.to_dict())})
    file = open_tensor_file(tmp_path / "clip.safetensors")
    assert read_clip(file, ON_CPU).shape.vision.activation == "quick_gelu"


def test_an_aesthetic_head_alone_says_what_it_needs(tmp_path):
    torch.save(head_of("mlp", 20).state_dict(), tmp_path / "sac.pth")
    with pytest.raises(SpoError, match=r"needs CLIP ViT-L/14 beside it: put model\.safetensors of huggingface\.co"):
        read_aesthetic_score(opened(tmp_path / "sac.pth"), "sac", ON_CPU)
    save_folder(transformers_clip(projection=24), tmp_path / "clip-vit-large-patch14")
    with pytest.raises(SpoError, match="features 20 wide, those of .* are 24 wide"):
        read_aesthetic_score(opened(tmp_path / "sac.pth"), "sac", ON_CPU)


# ---- files


def test_load_warns_once_of_the_missing_timestep(tmp_path):
    folder = save_folder(transformers_clip(), tmp_path / "PickScore_v1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(folder)
    assert isinstance(model, ClipScore)
    assert [str(w.message) for w in caught] == [f'"PickScore_v1": {NO_TIME}']


def test_damaged_files_are_one_sentence(tmp_path):
    clip = transformers_clip()
    tensors = {name: value.contiguous().clone() for name, value in clip.state_dict().items()}
    config = {"clip_config": json.dumps(clip.config.to_dict())}
    damages = {
        "lacks 1 of": {n: v for n, v in tensors.items() if n != "vision_model.encoder.layers.1.mlp.fc2.bias"},
        "it also holds": {**tensors, "vision_model.more": torch.ones(1)},
        "has the shape": {**tensors, "vision_model.post_layernorm.bias": torch.ones(2)},
    }
    for said, content in damages.items():
        save_file(content, tmp_path / "clip.safetensors", config)
        with pytest.raises(SpoError, match=said):
            read_clip_score(opened(tmp_path / "clip.safetensors"), "clip", ON_CPU)
    whole = (tmp_path / "clip.safetensors").read_bytes()
    (tmp_path / "clip.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SpoError, match="truncated"):
        read_clip_score(opened(tmp_path / "clip.safetensors"), "clip", ON_CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpoError, match="holds no CLIP"):
        load(tmp_path / "empty")
