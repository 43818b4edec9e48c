"""What the seam does to a real WebUI while it is borrowed, and that it is put back; where SPO_WEBUI_DIR names one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spo.algorithm.rollout import RolloutSettings
from spo.errors import SpoError
from spo.lora.read import read_lora
from spo.preference import load as preference_load
from spo.training.loop import train
from tests.tiny_host import MeanOfChannel
from tests.webui import test_host as host

webui = host.webui
pytestmark = pytest.mark.skipif(not os.environ.get("SPO_WEBUI_DIR"), reason="SPO_WEBUI_DIR does not name a WebUI")
TINY = ["tiny-sd1", "tiny-sdxl"]
ARCHITECTURE = dict(host.CHECKPOINTS)


def train_tiny(folder, name, preference=None, **changes):
    """A short run, borrowed for training; its report."""
    from spo.webui.host import borrowed

    config = host.config_for(folder, name, ARCHITECTURE[name], **changes)
    with borrowed(config, training=True) as borrowed_host:
        return train(borrowed_host, config, ["a fox", "a boat"], preference or MeanOfChannel())


def same_lora(first, second):
    """Whether two runs' LoRAs are equal to the bit."""
    one, other = read_lora(first.output).layers, read_lora(second.output).layers
    return all(torch.equal(one[key].up, other[key].up) and torch.equal(one[key].down, other[key].down) for key in one)


# ------------------------------------------------------------------------------------------------- --medvram, --lowvram


@pytest.fixture
def started_with(webui, monkeypatch):
    """`started_with("medvram", "tiny-sd1")` -> that checkpoint, loaded as the WebUI does with this flag."""
    from modules import sd_models, shared

    def start(flag, name):
        monkeypatch.setattr(shared.cmd_opts, flag, True)
        info = host.load(name).sd_checkpoint_info
        return host.load_afresh(info)

    yield start
    monkeypatch.undo()
    host.load_afresh(sd_models.model_data.sd_model.sd_checkpoint_info)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("flag", ["medvram", "medvram_sdxl"])
def test_medvram_trains_the_same_lora(started_with, tmp_path, monkeypatch, flag, name):
    from modules import lowvram

    host.load(name)
    before, plain = host.txt2img("Euler a"), train_tiny(tmp_path / "plain", name)
    model = started_with(flag, name)
    assert model.lowvram == (flag == "medvram" or name == "tiny-sdxl")
    during = []
    forward = type(model.model.diffusion_model).forward

    def look(self, *args, **kwargs):
        during.append(lowvram.module_in_gpu)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.diffusion_model), "forward", look)
        lean = train_tiny(tmp_path / "lean", name)
    assert set(during) == {model.model if model.lowvram else None}
    assert lowvram.module_in_gpu is None
    assert same_lora(plain, lean)
    assert np.array_equal(host.txt2img("Euler a"), before)


@pytest.mark.parametrize("name", TINY)
def test_lowvram_is_refused_for_training_alone(started_with, tmp_path, name):
    from spo.webui.host import borrowed

    before = host.load(name) and host.txt2img("Euler a")
    model = started_with("lowvram", name)
    with pytest.raises(SpoError, match="--lowvram.*start it with --medvram"):
        train_tiny(tmp_path, name)
    config = host.config_for(tmp_path, name, ARCHITECTURE[name])
    with borrowed(config) as lent:  # as voting does
        lent.prepare(["a fox"])
        latents = lent.rollout(["a fox"], [3], RolloutSettings(candidates=1), None, None).x
        assert lent.decode(latents).shape == (1, 3, 128, 128)
    assert model.lowvram
    assert np.array_equal(host.txt2img("Euler a"), before)


# -------------------------------------------------------------------------------------------- what is left in the model


@pytest.mark.parametrize("name", TINY)
def test_no_matrix_of_attention_is_saved_for_the_backward_pass(webui, tmp_path, name):
    import ldm.modules.attention
    import sgm.modules.attention
    from torch.autograd.graph import saved_tensors_hooks

    from spo.lora.adapter import Adapter, modules_of_kinds
    from spo.webui.host import borrowed

    host.load(name)
    classes = (ldm.modules.attention.CrossAttention, sgm.modules.attention.CrossAttention)
    before = [attention.forward for attention in classes]
    shapes = []

    def note(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    config = host.config_for(tmp_path, name, ARCHITECTURE[name], width=256, height=320)
    with borrowed(config, training=True) as lent:
        adapter = Adapter(lent.network, modules_of_kinds(lent.network, ("attention",)), rank=4, alpha=4, seed=0)
        try:
            lent.prepare(["a fox"])
            x = torch.randn(1, 4, 40, 32, generator=torch.Generator().manual_seed(0))
            with saved_tensors_hooks(note, lambda tensor: tensor):
                lent.denoise(x, torch.tensor([5.0]), ["a fox"], torch.tensor([2])).sum().backward()
        finally:
            adapter.remove()
    tokens = max(shape[1] for shape in shapes if len(shape) == 3)
    assert tokens >= 320
    assert not [shape for shape in shapes if shape[-2:] == (tokens, tokens)]
    assert [attention.forward for attention in classes] == before


@pytest.mark.parametrize("name", TINY)
def test_hypertile_of_the_last_generation_is_off_and_comes_back(webui, tmp_path, name):
    model = host.load(name)
    plain = train_tiny(tmp_path / "plain", name)
    before = host.txt2img("Euler a")
    hypertile = sys.modules["hypertile"]
    attention = [
        (key, module) for key, module in model.model.named_modules() if type(module).__name__ == "CrossAttention"
    ]
    layers = {depth: [key for key, _ in attention if key.endswith("attn1")] for depth in range(4)}
    former = hypertile.DEPTH_LAYERS, hypertile.DEPTH_LAYERS_XL
    hypertile.DEPTH_LAYERS = hypertile.DEPTH_LAYERS_XL = layers
    try:
        hypertile.hypertile_hook_model(model.model, 128, 128, enable=True, tile_size_max=64, swap_size=2)
        forwards = {key: module.__dict__.get("forward") for key, module in attention}
        assert any(forwards.values())
        tiled = train_tiny(tmp_path / "tiled", name)
        assert {key: module.__dict__.get("forward") for key, module in attention} == forwards
    finally:
        hypertile.DEPTH_LAYERS, hypertile.DEPTH_LAYERS_XL = former
        for _, module in attention:
            module.__dict__.pop("forward", None)
            module.__dict__.pop("__webui_hypertile_params", None)
        model.model.__dict__.pop("__webui_hypertile_layers", None)
    assert same_lora(plain, tiled)
    assert np.array_equal(host.txt2img("Euler a"), before)


SETTINGS = {
    "s_min_uncond": 4.0,
    "skip_early_cond": 0.5,
    "tiling": True,
    "face_restoration": True,
    "always_discard_next_to_last_sigma": True,
    "token_merging_ratio": 0.5,
    "eta_noise_seed_delta": 3,
}


@pytest.mark.parametrize("name", TINY)
def test_settings_that_training_does_not_have_are_out_of_the_rollout(webui, tmp_path, monkeypatch, name):
    from modules import sd_hijack, shared

    host.load(name)
    plain = train_tiny(tmp_path / "plain", name)
    for option, value in SETTINGS.items():
        monkeypatch.setitem(shared.opts.data, option, value)
    sd_hijack.model_hijack.apply_circular(True)  # as the last generation left it
    options = dict(shared.opts.data)
    other = train_tiny(tmp_path / "other", name)
    assert sd_hijack.model_hijack.circular_enabled
    sd_hijack.model_hijack.apply_circular(False)
    assert shared.opts.data == options
    assert same_lora(plain, other)


@pytest.mark.parametrize("name", TINY)
def test_token_merging_that_was_on_is_on_again(webui, tmp_path, name):
    from modules import sd_models

    model = host.load(name)
    plain = train_tiny(tmp_path / "plain", name)
    sd_models.apply_token_merging(model, 0.5)
    try:
        kinds = [type(module).__name__ for module in model.modules()]
        assert "ToMeBlock" in kinds
        merged = train_tiny(tmp_path / "merged", name)
        assert [type(module).__name__ for module in model.modules()] == kinds
        assert model.applied_token_merged_ratio == 0.5
    finally:
        sd_models.apply_token_merging(model, 0)
    assert same_lora(plain, merged)


# ------------------------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("change", ["another checkpoint", "FP8", "forced reload"])
def test_what_is_chosen_in_the_middle_waits_for_the_end(webui, tmp_path, monkeypatch, change):
    """As the dropdown and the settings page do it: the setting at once, the reload when the queue is free."""
    from modules import sd_models, shared

    model = host.load("tiny-sd1")
    plain, before = train_tiny(tmp_path / "plain", "tiny-sd1"), host.txt2img("Euler a")
    other = next(info for info in sd_models.checkpoints_list.values() if info.name == "tiny-sdxl.safetensors")
    for option in ("sd_model_checkpoint", "fp8_storage"):
        monkeypatch.setitem(shared.opts.data, option, getattr(shared.opts, option))
    calls = []

    def choose(scores):
        calls.append(scores)
        if len(calls) == 4:
            if change == "another checkpoint":
                shared.opts.data["sd_model_checkpoint"] = other.title
            elif change == "FP8":
                shared.opts.data["fp8_storage"] = "Enable"
            else:
                sd_models.reload_model_weights(forced_reload=True)
        return scores

    report = train_tiny(tmp_path / "chosen", "tiny-sd1", MeanOfChannel(then=choose))
    assert report.finished and same_lora(plain, report)
    assert sd_models.model_data.sd_model is model
    assert (shared.opts.data["sd_model_checkpoint"] == other.title) == (change == "another checkpoint")
    sd_models.reload_model_weights()  # what waited in the queue
    if change == "another checkpoint":
        assert sd_models.model_data.sd_model.sd_checkpoint_info is other
    if change == "FP8":
        assert torch.float8_e4m3fn in {value.dtype for value in model.model.diffusion_model.parameters()}
    monkeypatch.undo()
    for _ in range(2):  # the first time after FP8, the WebUI itself loads by way of half precision
        host.load_afresh(sd_models.select_checkpoint())
    assert np.array_equal(host.txt2img("Euler a"), before)


def test_a_refiner_left_loaded_is_swapped_back_at_start(webui, tmp_path):
    from modules import sd_models, shared

    from spo.webui import seam
    from spo.webui.jobs import job

    host.load("tiny-sd1")
    chosen = shared.opts.data["sd_model_checkpoint"]
    other = next(info for info in sd_models.checkpoints_list.values() if info.name == "tiny-sdxl.safetensors")
    with sd_models.SkipWritingToConfig():  # as `apply_refiner` does
        sd_models.reload_model_weights(info=other)
    assert seam.webui.loaded_checkpoint().architecture == "sdxl"
    assert seam.webui.other_left_loaded()
    assert job.ready_checkpoint().architecture == "sd15"
    assert shared.opts.data["sd_model_checkpoint"] == chosen
    with sd_models.SkipWritingToConfig():
        sd_models.reload_model_weights(info=other)
    assert train_tiny(tmp_path, "tiny-sd1").finished


def test_another_checkpoint_than_was_asked_for_is_refused(webui, tmp_path):
    host.load("tiny-sdxl")
    with pytest.raises(SpoError, match="changed to tiny-sdxl while this waited"):
        train_tiny(tmp_path, "tiny-sd1")


# -------------------------------------------------------------------------------------------------------------- the VAE


class LooksAtPictures(MeanOfChannel):
    """Scores by the decoded pictures."""

    needs_pixels = True

    def score(self, candidates, prompts):
        return candidates.pixels().mean((2, 3, 4))


def overflows(model, monkeypatch, value, below=torch.float64):
    """Make the VAE give this value while its precision is below another."""
    decode = model.decode_first_stage

    def decode_first_stage(latents):
        pictures = decode(latents)
        weak = next(model.first_stage_model.parameters()).dtype.itemsize < below.itemsize
        return torch.full_like(pictures, value) if weak else pictures

    monkeypatch.setattr(model, "decode_first_stage", decode_first_stage)


@pytest.mark.parametrize("name", TINY)
def test_a_half_precision_vae_that_overflows_is_switched_as_the_webui_does(webui, tmp_path, monkeypatch, name):
    from modules import devices, shared

    model = host.load(name)
    monkeypatch.setattr(devices, "dtype_vae", torch.bfloat16)
    monkeypatch.setitem(shared.opts.data, "auto_vae_precision", True)
    model.first_stage_model.to(torch.bfloat16)
    overflows(model, monkeypatch, float("nan"), below=torch.float32)
    try:
        assert train_tiny(tmp_path, name, LooksAtPictures()).finished
        assert devices.dtype_vae == torch.float32
        assert {value.dtype for value in model.first_stage_model.parameters()} == {torch.float32}
    finally:
        monkeypatch.undo()
        from modules import sd_models

        sd_models.reload_model_weights(forced_reload=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, -3.0])
@pytest.mark.parametrize("name", TINY)
def test_black_pictures_become_no_scores(webui, tmp_path, monkeypatch, name, value):
    model = host.load(name)
    before = host.txt2img("Euler a")
    with monkeypatch.context() as patch:
        overflows(model, patch, value)
        with pytest.raises(SpoError, match="The VAE .* not finite or all black"):
            train_tiny(tmp_path, name, LooksAtPictures())
    assert not list(tmp_path.glob("*.safetensors"))
    assert np.array_equal(host.txt2img("Euler a"), before)


# ------------------------------------------------------------------------------------------ prompts, precision, pickles


@pytest.mark.parametrize("name", TINY)
def test_prompts_are_encoded_once_and_rest_in_memory(webui, tmp_path, monkeypatch, name):
    from modules import prompt_parser

    from spo.webui.host import borrowed

    host.load(name)
    texts = []
    encode = prompt_parser.get_learned_conditioning

    def count(model, prompts, *args):
        texts.extend(prompts)
        return encode(model, prompts, *args)

    monkeypatch.setattr(prompt_parser, "get_learned_conditioning", count)
    config = host.config_for(tmp_path, name, ARCHITECTURE[name], negative_prompt="bad")
    prompts = ["a fox", "a boat AND a [fox:pear:3]"]
    with borrowed(config) as lent:
        lent.prepare(prompts)
        assert [text.strip() for text in texts] == ["a fox", "a boat", "a [fox:pear:3]", "bad"]
        lent.rollout(prompts, [1, 2], RolloutSettings(candidates=1), None, None)
        x = torch.zeros(2, 4, 16, 16)
        lent.denoise(x, torch.ones(2), prompts, torch.tensor([0, 1]))
        assert len(texts) == 4


@pytest.mark.parametrize("modules", [("attention",), ("attention", "feed-forward", "convolution")])
def test_adapter_weights_stay_float32_where_the_webui_casts_by_hand(webui, tmp_path, monkeypatch, modules):
    """As on MPS and on GTX 16xx, here in bfloat16."""
    from modules import devices, sd_models

    from spo.lora.adapter import Adapter, modules_of_kinds
    from spo.webui.host import borrowed

    model = host.load("tiny-sd1")
    config = host.config_for(tmp_path, "tiny-sd1", "sd15", modules=list(modules))
    with monkeypatch.context() as patch:
        for name in ("dtype", "dtype_unet", "dtype_inference"):
            patch.setattr(devices, name, torch.bfloat16)
        patch.setattr(devices, "cuda_no_autocast", lambda: True)
        for part in (model.model, model.cond_stage_model):
            part.to(torch.bfloat16)
        with borrowed(config, training=True) as lent:
            adapter = Adapter(lent.network, modules_of_kinds(lent.network, modules), rank=4, alpha=4, seed=0)
            try:
                weights = list(adapter.parameters())
                with torch.no_grad():
                    for weight in weights:
                        weight.copy_(torch.full_like(weight, 1 / 3))
                lent.prepare(["a fox"])
                latents = lent.rollout(["a fox"], [1], RolloutSettings(candidates=1), None, None).x
                assert torch.isfinite(latents).all()
                loss = lent.denoise(torch.ones(1, 4, 16, 16), torch.ones(1), ["a fox"], torch.tensor([1])).sum()
                loss.backward()
                assert all(weight.dtype == torch.float32 for weight in weights)
                assert all(torch.equal(weight, torch.full_like(weight, 1 / 3)) for weight in weights)
                assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in weights)
            finally:
                adapter.remove()
        patch.setattr(devices, "fp8", True)
        model.model.diffusion_model.to(torch.float8_e4m3fn)
        patch.setattr(devices, "device", torch.device("meta"))  # not the CPU, where FP8 has autocast
        with pytest.raises(SpoError, match="FP8 weights cannot be trained"):
            train_tiny(tmp_path, "tiny-sd1")
    sd_models.reload_model_weights(forced_reload=True)


def test_a_ckpt_that_the_webui_has_loaded_is_trained(webui, tmp_path, monkeypatch):
    from modules import sd_models
    from safetensors.torch import load_file

    from spo.checkpoint import tensor_file
    from spo.webui.jobs import training

    source = Path(host.load("tiny-sd1").sd_checkpoint_info.filename)
    pickle = source.with_name("spo-test-pickled.ckpt")
    torch.save({"state_dict": load_file(source)}, pickle)
    pickle.with_suffix(".yaml").write_text(source.with_suffix(".yaml").read_text())
    sd_models.list_models()
    try:
        host.load("spo-test-pickled", ".ckpt")

        def opened(path):
            raise AssertionError(f"{path} is opened once more")

        monkeypatch.setattr(tensor_file, "_load_pickle", opened)
        monkeypatch.setattr(preference_load, "DEMO_CHECKPOINTS", (pickle.name,))  # so that "demo" is taken
        request = training.TrainingRequest(
            "spo-test-of-a-pickle", ["a fox"], {"preference": "demo", "width": 128, "height": 128}
        )
        assert "sd15" in training.plan_text(request)
        from spo.webui.host import borrowed

        config = host.config_for(tmp_path, "spo-test-pickled", "sd15", checkpoint=str(pickle))
        with borrowed(config, training=True) as lent:
            assert train(lent, config, ["a fox", "a boat"], MeanOfChannel()).finished
    finally:
        host.load("tiny-sd1")
        pickle.unlink()
        pickle.with_suffix(".yaml").unlink()
        sd_models.list_models()
