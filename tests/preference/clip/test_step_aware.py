"""The step-aware preference model against the published implementation's recording and transformers' CLIP."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from spo.algorithm.preference import Candidates
from spo.checkpoint.tensor_file import open_tensor_file
from spo.errors import SpoError
from spo.preference.clip.step_aware import StepAwareCLIP, read_step_aware_clip
from spo.preference.clip.towers import (
    ClipShape,
    TowerShape,
    clip_shape,
    prepare_pictures,
    token_ids,
)
from spo.preference.load import load
from spo.preference.placement import ON_CPU, Placement
from tests.conftest import GOLDEN, half_works, relative_error

SHAPES = ("square", "tall", "wide")
needs_float16 = pytest.mark.skipif(not half_works(), reason="this PyTorch has no float16 on the CPU")
TIME_NAMES = ("t_embedder", "adaLN_modulation")


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("step_aware_preference_model")


@pytest.fixture(scope="module")
def metadata():
    with safe_open(GOLDEN / "step_aware_preference_model.safetensors", "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def weights(recorded):
    """name -> tensor as in a published file."""
    table = torch.zeros(49408, recorded["token_embedding.values"].shape[1])
    table[recorded["token_embedding.rows"]] = recorded["token_embedding.values"]
    found = {name.removeprefix("weights."): value for name, value in recorded.items() if name.startswith("weights.")}
    return {**found, "model.text_model.embeddings.token_embedding.weight": table}


@pytest.fixture(scope="module")
def spm_file(weights, metadata, tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "tiny_step-aware_preference_model.safetensors"
    save_file(weights, path, {"clip_config": metadata["clip_config"]})
    return path


@pytest.fixture
def model(spm_file):
    return load(spm_file)


def candidates_of(pictures, timestep):
    """[K, B, 3, H, W] pictures as a pool whose decoder returns them."""
    latents = torch.zeros(*pictures.shape[:2], 4, 8, 8)
    return Candidates(latents, 1.0, float(timestep), latents, lambda flat: pictures.flatten(0, 1))


def scores_of(model, recorded, metadata, shape):
    """Scores through the protocol, one picture at a time since the recorded timesteps differ."""
    pictures, timesteps = recorded[f"{shape}.images"][:, None, None], recorded[f"{shape}.timesteps"]
    pools = [candidates_of(*row) for row in zip(pictures, timesteps, strict=True)]
    prompts = json.loads(metadata["prompts"])
    return torch.cat([model.score(pool, [prompt])[0] for pool, prompt in zip(pools, prompts, strict=True)])


# ---- against the published implementation


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_as_published(model, recorded, metadata, shape):
    scores = scores_of(model, recorded, metadata, shape)
    assert scores.dtype == torch.float32
    assert relative_error(scores, recorded[f"{shape}.scores"]) < 1e-5


def test_every_published_name_is_accounted_for(model):
    published = json.loads((GOLDEN / "step_aware_preference_model_keys.json").read_text())
    assert sorted(published) == sorted(f"model.{name}" for name in model.state_dict())


def test_token_ids_as_published(recorded, metadata):
    assert torch.equal(token_ids(json.loads(metadata["prompts"])), recorded["input_ids"])


# ---- against transformers' CLIP, which knows no time


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_fresh_model_with_clip_weights_is_clip(activation):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"intermediate_size": 96, "num_hidden_layers": 2, "hidden_act": activation}
    config = CLIPConfig(
        text_config={"hidden_size": 32, "num_attention_heads": 2, "eos_token_id": 49407, **sizes},
        vision_config={"hidden_size": 48, "num_attention_heads": 3, "image_size": 28, "patch_size": 14, **sizes},
        projection_dim=20,
    )
    clip = CLIPModel(config).eval()
    for parameter in clip.parameters():
        nn.init.normal_(parameter, std=0.3)
    tensors = {name: value for name, value in clip.state_dict().items() if not name.endswith("position_ids")}
    model = StepAwareCLIP(clip_shape({name: value.shape for name, value in tensors.items()}, config.to_dict()))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert missing and all(any(part in name for part in TIME_NAMES) for name in missing)

    pixels, ids = torch.rand(2, 3, 28, 28) * 2 - 1, token_ids(["a red house", ""])
    with torch.no_grad():
        answer = clip(input_ids=ids, pixel_values=prepare_pictures(pixels, 28))
        assert relative_error(model.image_features(pixels, torch.tensor([3.5, 999])), answer.image_embeds) < 1e-5
        assert relative_error(model.text_features(ids), answer.text_embeds) < 1e-5


# ---- scoring


def test_scores_do_not_depend_on_the_pictures_per_call(model, recorded):
    pictures = recorded["tall.images"].repeat(2, 1, 1, 1)[:6].unflatten(0, (3, 2))
    prompts = ["a cat driving a nuke", ""]
    whole = model.score(candidates_of(pictures, 601.5), prompts)
    assert whole.shape == (3, 2)
    for count in (1, 4):
        model.pictures_per_call = count
        assert torch.allclose(model.score(candidates_of(pictures, 601.5), prompts), whole, atol=1e-5)
    swapped = model.score(candidates_of(pictures.flip(1), 601.5), prompts[::-1])
    assert torch.allclose(swapped.flip(1), whole, atol=1e-5)
    assert not torch.allclose(model.score(candidates_of(pictures, 1), prompts), whole, atol=1e-2)


def test_wrong_number_of_prompts(model, recorded):
    with pytest.raises(ValueError, match="1 prompts for 4 images"):
        model.score(candidates_of(recorded["square.images"][None], 1), ["one"])


def test_a_prompt_is_encoded_once(model, recorded):
    encoded = []
    model.text_model.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    pool = candidates_of(recorded["square.images"][None], 201)
    first = model.score(pool, ["a", "b", "a", "a"])
    model.score(pool, ["b", "b", "b", "a"])
    model.score(pool, ["a", "c", "a", "a"])
    assert sum(encoded) == 3
    assert torch.equal(model.score(pool, ["a", "b", "a", "a"]), first)


def test_training_the_text_tower_makes_known_prompts_out_of_date(model, recorded):
    pool = candidates_of(recorded["square.images"][:1][None], 201)
    before = model.score(pool, ["a cat"])
    model.requires_grad_(True)
    model.text_features(token_ids(["a cat"])).square()[:, 0].sum().backward()
    with torch.no_grad():
        for parameter in model.text_model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad.sign()
    while_training = model.score(pool, ["a cat"])
    assert not torch.allclose(before, while_training, atol=1e-3)
    model.requires_grad_(False)
    assert torch.equal(model.score(pool, ["a cat"]), while_training)


def test_gradients_reach_every_weight_and_the_pictures(model, recorded):
    model.requires_grad_(True)
    pictures = recorded["wide.images"].clone().requires_grad_()
    image = model.image_features(pictures, recorded["wide.timesteps"])
    (model.logit_scale.exp() * (image * model.text_features(recorded["input_ids"])).sum(-1)).square().sum().backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert [name for name in without if not name.endswith("k_proj.bias")] == []  # a key's bias has no effect
    assert pictures.grad.abs().sum() > 0


def test_scoring_leaves_no_graph_and_ignores_autocast(model, recorded, metadata):
    model.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scores_of(model, recorded, metadata, "square")
    assert not scores.requires_grad
    assert relative_error(scores, recorded["square.scores"]) < 1e-5


def test_bfloat16(spm_file, recorded, metadata):
    model = load(spm_file, precision="bfloat16")
    half = {name for name, value in model.named_parameters() if value.dtype == torch.bfloat16}
    matrices = (".self_attn.", ".mlp.", ".patch_embedding.")
    assert half == {
        name
        for name, _ in model.named_parameters()
        if name.startswith("vision_model.") and any(part in name for part in matrices)
    }
    scores = scores_of(model, recorded, metadata, "tall")
    assert scores.dtype == torch.float32
    assert relative_error(scores, recorded["tall.scores"]) < 0.01


def test_float16_works_or_says_what_to_do(spm_file, recorded, metadata):
    """PyTorch 2.1 has no float16 on a CPU."""
    try:
        model = load(spm_file, precision="float16")
    except SpoError as error:
        assert "use preference_precision float32" in str(error)
    else:
        assert relative_error(scores_of(model, recorded, metadata, "wide"), recorded["wide.scores"]) < 0.002


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=needs_float16)])
def test_half_precision_stands_what_grows_large(weights, metadata, recorded, tmp_path, precision):
    """Channels of the stream a thousand times as large as usual, as trained towers have a few, lose no precision."""
    grown = {name: value.clone() for name, value in weights.items()}
    for name, value in grown.items():
        if ".mlp.fc2.bias" in name and "vision_model" in name:
            value[3] = 3e4  # two blocks of them: beyond float16
    path = tmp_path / "grown.safetensors"
    save_file(grown, path, {"clip_config": metadata["clip_config"]})
    exact = scores_of(load(path), recorded, metadata, "square")
    assert relative_error(scores_of(load(path, precision=precision), recorded, metadata, "square"), exact) < 0.01


def test_the_modulation_is_computed_once_a_timestep(model, recorded):
    computed = []
    model.t_embedder.register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].tolist()))
    pictures = recorded["square.images"][None]
    first = model.score(candidates_of(pictures, 201), ["a"] * 4)
    model.score(candidates_of(pictures, 401), ["a"] * 4)
    assert torch.equal(model.score(candidates_of(pictures, 201), ["b", "a", "a", "a"])[:, 1:], first[:, 1:])
    assert computed == [[201.0], [401.0]]
    model.requires_grad_(True)
    model.score(candidates_of(pictures, 201), ["a"] * 4)
    assert computed[2:] == [[201.0]]


def test_weights_rest_in_main_memory(spm_file, recorded, metadata):
    """The picture tower comes to the device for a verdict; the text tower and the modulation never do."""
    file = open_tensor_file(spm_file)
    model = read_step_aware_clip(file, "spm", Placement(torch.device("meta"), torch.bfloat16, rests=True))
    places = lambda: {name for name, value in model.named_parameters() if value.device.type == "meta"}  # noqa: E731
    assert places() == set()
    with model.resting.awake():
        moved = places()
    assert places() == set()
    at_home = [name for name, _ in model.named_parameters() if name not in moved]
    once = ("text_model", "text_projection", "t_embedder", "vision_model.adaLN", "vision_model.encoder.layers")
    assert at_home and all(name.startswith(once) for name in at_home)
    assert all("adaLN" in name for name in at_home if name.startswith("vision_model."))
    model.resting = None
    assert relative_error(scores_of(model, recorded, metadata, "tall"), recorded["tall.scores"]) < 0.01


# ---- files


def test_a_torch_file_with_positions_loads_the_same(weights, metadata, recorded, tmp_path):
    path = tmp_path / "sd-v1-5_step-aware_preference_model.bin"
    positions = {
        "model.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    torch.save({**weights, **positions}, path)
    model = read_step_aware_clip(
        open_tensor_file(path), path.stem, ON_CPU, clip_config=json.loads(metadata["clip_config"])
    )
    assert model.name == "sd-v1-5_step-aware_preference_model"
    assert model.needs_pixels
    assert not any(value.requires_grad for value in model.parameters())
    path.unlink()
    assert relative_error(scores_of(model, recorded, metadata, "square"), recorded["square.scores"]) < 1e-5


def without(weights, *parts):
    return {name: value for name, value in weights.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda w: without(w, *TIME_NAMES, "logit_scale"), "is a CLIP that lacks its text tower"),
        (lambda w: without(w, "layers.1.mlp.fc1.bias"), r"lacks 2 of 106 tensors: .*layers\.1\.mlp\.fc1\.bias"),
        (lambda w: without(w, "visual_projection"), 'incomplete: the tensor "visual_projection.weight" is missing'),
        (lambda w: {**w, "model.vision_model.more": torch.ones(1)}, "it also holds .vision_model.more"),
        (lambda w: {**w, "model.logit_scale": torch.ones(2)}, r'"logit_scale" has the shape \[2\], not \[\]'),
        (lambda w: {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(1)}, "is a LoRA"),
        (lambda w: {"model.diffusion_model.out.2.weight": torch.ones(1)}, "is a checkpoint of another kind"),
        (lambda w: {"visual.transformer.resblocks.0.ln_1.bias": torch.ones(1)}, "is a CLIP that lacks its text tower"),
        (lambda w: {"blip.visual_encoder.cls_token": torch.ones(1)}, "is ImageReward"),
        (lambda w: {"text_model.final_layer_norm.bias": torch.ones(1)}, "is a text encoder"),
        (lambda w: {"decoder.conv_in.weight": torch.ones(1)}, "is a VAE"),
        (lambda w: {"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "is a UNet alone"),
        (lambda w: {"layers.0.weight": torch.ones(1)}, r"something else \(its first tensors: layers\.0\.weight\)"),
    ],
)  # fmt: skip
def test_other_files_are_refused_by_name(weights, metadata, tmp_path, content, said):
    path = tmp_path / "model.safetensors"
    tensors = {name: value.clone() for name, value in content(weights).items()}
    save_file(tensors, path, {"clip_config": metadata["clip_config"]})
    with pytest.raises(SpoError, match=said) as caught:
        load(path)
    assert '"model.safetensors"' in str(caught.value)


def test_truncated_files_are_refused(spm_file, weights, tmp_path):
    torch.save(weights, tmp_path / "whole.bin")
    for source, name in ((spm_file, "cut.safetensors"), (tmp_path / "whole.bin", "cut.bin")):
        (tmp_path / name).write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        with pytest.raises(SpoError, match="truncated"):
            load(tmp_path / name)


class RunsCode:
    """Unpickled by Python's own loader, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo unsafe > {self.path}",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    made = tmp_path / "made_by_the_pickle"
    torch.save({"model.logit_scale": RunsCode(made)}, tmp_path / "new.bin")
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": RunsCode(made)}, tmp_path / "beside.pt")
    torch.save({"a": RunsCode(made)}, tmp_path / "older.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "old.bin").write_bytes(pickle.dumps(RunsCode(made)))
    for name in ("new.bin", "beside.pt", "older.bin", "old.bin"):
        with pytest.raises(SpoError, match=f'"{name}" is a pickle that holds more than tensors'):
            load(tmp_path / name)
    assert not made.exists()
    pickle.loads((tmp_path / "old.bin").read_bytes())
    assert made.exists()  # so the payload is a real one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_any_precision_and_format_of_file(weights, metadata, recorded, tmp_path, dtype, suffix):
    path = tmp_path / f"spm{suffix}"
    tensors = {name: value.to(dtype) for name, value in weights.items()}
    if suffix == ".bin":
        torch.save(tensors, path)
        model = read_step_aware_clip(open_tensor_file(path), "spm", clip_config=json.loads(metadata["clip_config"]))
    else:
        save_file(tensors, path, {"clip_config": metadata["clip_config"]})
        model = load(path)
    at_home = torch.float32 if suffix == ".bin" else dtype  # what is used once a prompt or timestep, as in the file
    assert model.text_projection.weight.dtype == model.vision_model.adaLN_modulation[1].weight.dtype == at_home
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.float32
    allowed = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    assert relative_error(scores_of(model, recorded, metadata, "tall"), recorded["tall.scores"]) < allowed


def test_heads_that_do_not_fit_are_named(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")  # without clip_config, and too narrow for the default
    with pytest.raises(SpoError, match="text tower 32 wide, which cannot have 0 heads"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "architecture", "warned"),
    [
        ("sdxl_step-aware_preference_model", "sd15", True),
        ("SD_XL spm", "sd15", True),
        ("sd-v1-5_step-aware_preference_model", "sdxl", True),
        ("mine_sd15", "sdxl", True),
        ("sdxl_step-aware_preference_model", "sdxl", False),
        ("sd-v1-5_step-aware_preference_model", "sd15", False),
        ("mine", "sdxl", False),
    ],
)
def test_warns_of_the_other_architecture(spm_file, tmp_path, name, architecture, warned):
    path = Path(tmp_path / f"{name}.safetensors")
    path.symlink_to(spm_file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(path, architecture=architecture)
    ours = [str(w.message) for w in caught if "was made for" in str(w.message)]
    assert len(ours) == warned
    assert all(f"the checkpoint is {architecture}" in text for text in ours)


def test_sizes_of_the_official_model_follow_from_its_shapes():
    text, vision = TowerShape(1024, 4096, 24, 16), TowerShape(1280, 5120, 32, 16)
    with torch.device("meta"):
        model = StepAwareCLIP(ClipShape(text, vision, 49408, 14, 224, 1024))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert clip_shape(shapes) == model.shape
    without_time = [v.numel() for name, v in model.named_parameters() if not any(part in name for part in TIME_NAMES)]
    assert sum(without_time) == 986_109_441  # what is said of OpenCLIP's ViT-H/14
    assert model.training_bytes() == 16 * 1_306_176_001
    assert model.training_bytes(train_text=False) == 16 * 1_306_176_001 - 12 * (352_984_064 + 1_048_576)
