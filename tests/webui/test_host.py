"""The loaded checkpoint of a real WebUI 1.10.1 as a host, in this process. Runs where SPO_WEBUI_DIR names one.

The WebUI's own python runs this, on its tiny checkpoints:

    SPO_WEBUI_DIR=<webui> python -m pytest tests/webui
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spo.config import build_config
from spo.errors import SpoError
from spo.lora.read import read_lora
from spo.training.loop import train
from spo.webui import seam
from tests.tiny_host import MeanOfChannel
from tests.webui import started

WEBUI = os.environ.get("SPO_WEBUI_DIR")
pytestmark = pytest.mark.skipif(not WEBUI, reason="SPO_WEBUI_DIR does not name a WebUI")
not_in_forge = pytest.mark.skipif(started.IS_FORGE, reason="A1111's own way; test_forge.py has what Forge refuses")
CHECKPOINTS = [(started.SD15, "sd15"), (started.SDXL, "sdxl")]
PROMPT = "a (red:1.3) [fox:boat:0.5] AND a pear :0.6"


@pytest.fixture(scope="module")
def webui():
    """The WebUI's modules, loaded as its own start does, on the CPU and without its server."""
    with started.started():
        yield


def load(name, ending=".safetensors"):
    from modules import sd_models, shared

    if started.IS_FORGE:
        seam.webui.load_checkpoint(f"{name}{ending}")
        return sd_models.model_data.get_sd_model()
    if not started.IS_FORK:
        sd_models.model_data.get_sd_model()  # the WebUI's start loads one in a thread of its own; wait for it
    info = next(info for info in sd_models.checkpoints_list.values() if info.name == f"{name}{ending}")
    shared.opts.data["sd_model_checkpoint"] = info.title
    sd_models.reload_model_weights(info=info)
    return sd_models.model_data.get_sd_model()


def networks_of(model):
    """The networks of the WebUI's model as one module."""
    if not started.IS_FORGE:
        return model
    objects = model.forge_objects
    parts = [objects.unet.model, objects.clip.cond_stage_model, objects.vae.first_stage_model]
    return torch.nn.ModuleList(parts)


def tree_of(model):
    return [
        (key, id(module), type(module), module.training) for key, module in networks_of(model).named_modules() if key
    ]


def load_afresh(info):
    """Load a checkpoint as at the WebUI's start; what it empties on the way leaves the list to reuse from."""
    from modules import sd_models

    model = sd_models.load_model(info)
    sd_models.model_data.loaded_sd_models[:] = [model]
    return model


def txt2img(sampler_name, *, prompt=PROMPT, seed=7, scheduler="Karras", size=started.SIZE, steps=8, pictures=2):
    from modules import processing, shared

    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=shared.sd_model, prompt=prompt, negative_prompt="bad", seed=seed, steps=steps, cfg_scale=5, width=size,
        height=size, sampler_name=sampler_name, batch_size=pictures, do_not_save_samples=True, do_not_save_grid=True,
    )  # fmt: skip
    p.scheduler = scheduler  # Forge classic has no such field
    started.without_scripts(p)
    try:
        return np.stack([np.asarray(image) for image in processing.process_images(p).images[-pictures:]]).astype(int)
    finally:
        p.close()


class WebUIDraws:
    """The WebUI's own noise, image by image, as its Euler a draws it; one candidate only."""

    def __init__(self, size, seeds):
        from modules import rng

        self.generator = rng.ImageRNG((4, size // 8, size // 8), seeds)

    def noise(self, step, candidates, like):
        assert candidates == 1
        return self.generator.next().to(like)[None]


def one_candidate(*, prompt=PROMPT, seed=7, scheduler="Karras", size=started.SIZE):
    """As `txt2img`, by `sample_spo` with K = 1 in the WebUI's own loop, on its sampler's noise levels and noise."""
    from modules import processing, sd_samplers, shared

    from spo.algorithm.rollout import RolloutSettings, sample_spo

    p = SimpleNamespace(
        is_hr_pass=False, scheduler=scheduler, sampler_noise_scheduler_override=None, extra_generation_params={},
        sd_model=shared.sd_model,
    )  # fmt: skip
    sigmas = sd_samplers.create_sampler("Euler a", shared.sd_model).get_sigmas(p, 8)
    draws = WebUIDraws(size, [seed, seed + 1])

    def sample(model, x, sigmas, extra_args, callback, disable):
        return sample_spo(
            model, x, sigmas, extra_args, callback, settings=RolloutSettings(candidates=1), draws=draws,
            alphas_cumprod=seam.webui.loaded_checkpoint().alphas_cumprod,
        ).x  # fmt: skip

    request = seam.webui.PictureRequest([prompt] * 2, [seed, seed + 1], "bad", 8, 5, size, size)
    made = seam.webui.txt2img(request, seam.webui.OwnSampling(sample, sigmas, draws.generator.next()))
    decoded = torch.stack(processing.decode_latent_batch(shared.sd_model, made.latents)).float()
    return ((decoded + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy().astype(int)


def config_for(folder: Path, name, architecture, **changes):
    values = {
        "checkpoint": str(Path(str(WEBUI)) / "models" / "Stable-diffusion" / f"{name}.safetensors"),
        "prompts": "prompts.txt",
        "output": str(folder / f"{name}.safetensors"),
        "width": started.SIZE,
        "height": started.SIZE,
        "sampling_steps": 6,
        "divert_start_step": 1,
        "threshold": 0.0,
        "prompts_per_batch": 2,
        "pairs_per_update": 4,
        "accumulation": 1,
        "steps": 3,
        "learning_rate": 1e-2,
        "save_every": 0,
        "rank": 4,
        "save_precision": "float32",
    }
    return build_config({**values, **changes}, architecture)


@pytest.mark.parametrize("scheduler", ["Automatic", "Karras"])
@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS)
def test_one_candidate_is_euler_a(webui, monkeypatch, name, architecture, scheduler):
    from modules import shared

    load(name)
    # Forge classic's own samplers leave guidance out of the first step at 0 already (step <= 0); ours have it there
    monkeypatch.setitem(shared.opts.data, "skip_early_cond", -1.0)
    euler, spo = txt2img("Euler a", scheduler=scheduler), one_candidate(scheduler=scheduler)
    assert euler.std() > 5
    assert np.abs(euler - spo).max() <= 1


@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS)
def test_training_borrows_the_model_and_gives_it_back(webui, tmp_path, name, architecture):
    from spo.webui.host import borrowed

    model = load(name)
    assert seam.webui.loaded_checkpoint().architecture == seam.webui.glance().architecture == architecture
    before = txt2img("Euler a")
    weights = {key: value.clone() for key, value in networks_of(model).state_dict().items()}
    tree = tree_of(model)
    flags = [(key, parameter.requires_grad) for key, parameter in networks_of(model).named_parameters()]
    config = config_for(tmp_path, name, architecture)
    with borrowed(config) as host:
        report = train(host, config, ["a (red:1.3) fox", "[a boat:a pear:0.5] on a lake"], MeanOfChannel())

    assert report.finished
    layers = read_lora(report.output).layers
    assert all(float(layer.up.abs().max()) > 0 or "attn1" in key for key, layer in layers.items())
    after = networks_of(model).state_dict()
    assert after.keys() == weights.keys()
    same = (torch.allclose(after[key], weights[key], rtol=0, atol=0, equal_nan=True) for key in weights)
    assert all(same)  # NaN: Forge leaves a text projection that SD1.5 lacks uninitialised
    assert tree_of(model) == tree
    assert [(key, parameter.requires_grad) for key, parameter in networks_of(model).named_parameters()] == flags
    assert np.array_equal(txt2img("Euler a"), before)


@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS)
def test_the_training_step_sees_what_the_sampler_saw(webui, tmp_path, name, architecture):
    """`denoise` at a step of the rollout equals the CFG denoiser there: weights, editing, AND, guidance."""

    from spo.webui.host import borrowed

    load(name)
    config = config_for(tmp_path, name, architecture, negative_prompt="bad")
    with borrowed(config) as host:
        host.prepare([PROMPT])
        seen = {}
        from modules import sd_samplers_cfg_denoiser

        forward = sd_samplers_cfg_denoiser.CFGDenoiser.forward

        def look(self, x, sigma, *args, **kwargs):
            step = self.step
            denoised = forward(self, x, sigma, *args, **kwargs)
            seen[step] = (x.clone(), sigma.clone(), denoised.clone())
            return denoised

        sd_samplers_cfg_denoiser.CFGDenoiser.forward = look
        try:
            from spo.algorithm.rollout import RolloutSettings

            host.rollout([PROMPT], [3], RolloutSettings(candidates=1), None, None)
        finally:
            sd_samplers_cfg_denoiser.CFGDenoiser.forward = forward
        for step in (0, 2, 5):
            x, sigma, expected = seen[step]
            with torch.no_grad():
                found = host.denoise(x, sigma, [PROMPT], torch.tensor([step]))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS[:1])
def test_a_pool_in_several_calls_is_one_step_of_prompt_editing(webui, tmp_path, name, architecture):
    from spo.algorithm.rollout import RolloutSettings
    from spo.webui.host import borrowed

    load(name)
    with borrowed(config_for(tmp_path, name, architecture)) as host:
        host.prepare([PROMPT])
        settings = RolloutSettings(candidates=3, divert_start_step=1, threshold=0.0)
        whole, parts = (
            host.rollout([PROMPT], [3], dataclasses.replace(settings, candidates_per_call=size), MeanOfChannel(), None)
            for size in (0, 1)
        )
    torch.testing.assert_close(parts.x, whole.x, rtol=1e-3, atol=1e-3)


def train_tiny(folder, name, architecture, prompts=("a fox", "a boat"), **changes):
    from spo.webui.host import borrowed

    config = config_for(folder, name, architecture, **changes)
    with borrowed(config) as host:
        return train(host, config, list(prompts), MeanOfChannel())


@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS)
def test_gradient_checkpointing_changes_nothing_but_memory(webui, tmp_path, name, architecture):
    load(name)
    network = seam.webui.loaded_checkpoint().network
    forwards = [module.forward.__func__ for module in network.modules()]
    plain = train_tiny(tmp_path / "a", name, architecture)
    saving = train_tiny(tmp_path / "b", name, architecture, gradient_checkpointing=True)
    expected, found = read_lora(plain.output).layers, read_lora(saving.output).layers
    for key, layer in expected.items():
        # Forks add in place, so their sums round otherwise; AdamW makes that large where a gradient is nearly 0
        atol = max(1e-6, 5e-3 * float(layer.up.abs().max())) if started.IS_FORK else 1e-6
        assert torch.allclose(found[key].up, layer.up, rtol=1e-3, atol=atol), key
    assert [module.forward.__func__ for module in network.modules()] == forwards


@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS)
def test_loras_in_training_prompts_act_and_the_active_ones_come_back(webui, tmp_path, name, architecture):
    import networks
    from modules import shared

    load(name)
    folder = Path(shared.cmd_opts.lora_dir)
    made = train_tiny(tmp_path, name, architecture).output
    (folder / "spo-test-style.safetensors").write_bytes(made.read_bytes())
    networks.list_available_networks()
    try:
        plain = txt2img("Euler a", prompt="a fox")
        styled = txt2img("Euler a", prompt="a fox <lora:spo-test-style:1>")
        assert not np.array_equal(plain, styled)
        active = [(net.name, net.unet_multiplier) for net in networks.loaded_networks]
        prompts = ["a fox <lora:spo-test-style:0.5>", "a boat <lora:spo-test-style:0.5>"]
        other = train_tiny(tmp_path / "styled", name, architecture, prompts).output
        assert [(net.name, net.unet_multiplier) for net in networks.loaded_networks] == active
        assert not torch.equal(*(read_lora(p).layers[sorted(read_lora(p).layers)[0]].up for p in (made, other)))
        assert np.array_equal(txt2img("Euler a", prompt="a fox"), plain)
        assert np.array_equal(txt2img("Euler a", prompt="a fox <lora:spo-test-style:1>"), styled)
        with pytest.raises(SpoError, match="must name the same LoRAs"):
            train_tiny(tmp_path / "mixed", name, architecture, ["a fox", "a boat <lora:spo-test-style:0.5>"])
    finally:
        (folder / "spo-test-style.safetensors").unlink()
        networks.list_available_networks()


@not_in_forge
@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS)
@pytest.mark.parametrize("other", [started.SD15, started.SDXL, "same kind"])
def test_a_switch_of_the_checkpoint_ends_the_run_and_the_new_one_is_whole(webui, tmp_path, name, architecture, other):
    """Behind the queue's back, as no button of the WebUI does it, but another extension may."""
    from modules import sd_models, shared

    from spo.webui.host import borrowed

    twin = None
    if other == "same kind":
        twin = Path(str(WEBUI)) / "models" / "Stable-diffusion" / f"{name}-twin.safetensors"
        source = Path(load(name).sd_checkpoint_info.filename)
        from safetensors.torch import load_file, save_file

        tensors = load_file(source)
        save_file({key: value * 1.01 if value.is_floating_point() else value for key, value in tensors.items()}, twin)
        twin.with_suffix(".yaml").write_text(source.with_suffix(".yaml").read_text())
        sd_models.list_models()
        other = f"{name}-twin"
    try:
        load(other)
        expected = txt2img("Euler a")
        load(name)
        before = txt2img("Euler a")
        config = config_for(tmp_path, name, architecture, steps=6, save_every=1, inner_steps=0, accumulation=1)
        calls = []

        def switch(scores):
            calls.append(scores)
            if len(calls) == 7:
                load(other)
            return scores

        if other == name:
            return
        with pytest.raises(SpoError, match="switched"), borrowed(config) as host:
            train(host, config, ["a fox", "a boat"], MeanOfChannel(then=switch))
        assert shared.sd_model.sd_checkpoint_info.name.startswith(other)
        assert np.array_equal(txt2img("Euler a"), expected)
        load(name)
        assert np.array_equal(txt2img("Euler a"), before)
        with borrowed(config) as host:
            assert train(host, config, ["a fox", "a boat"], MeanOfChannel(), resume=True).finished
    finally:
        if twin is not None:
            load(name)
            twin.unlink()
            twin.with_suffix(".yaml").unlink()
            sd_models.list_models()


def test_v_prediction(webui, tmp_path):
    model = load(started.SD15)
    place, name, usual, other = model, "parameterization", "eps", "v"
    if started.IS_FORGE:
        place, name, usual, other = (
            model.forge_objects.unet.model.predictor,
            "prediction_type",
            "epsilon",
            "v_prediction",
        )
    assert getattr(place, name) == usual
    setattr(place, name, other)
    try:
        euler, spo = txt2img("Euler a"), one_candidate()
        assert np.abs(euler - spo).max() <= 1
        report = train_tiny(tmp_path, started.SD15, "sd15")
        assert read_lora(report.output).metadata["modelspec.prediction_type"] == "v"
    finally:
        setattr(place, name, usual)


@not_in_forge
def test_weights_stored_in_float8(webui, tmp_path):
    from modules import sd_models, shared

    load(started.SD15)
    shared.opts.data["fp8_storage"] = "Enable"
    try:
        sd_models.reload_model_weights(forced_reload=True)
        types = {value.dtype for value in shared.sd_model.model.diffusion_model.parameters()}
        assert torch.float8_e4m3fn in types
        before = txt2img("Euler a")
        # an empty text is NaN here in the WebUI itself, on a CPU with float8: its own txt2img is black then
        report = train_tiny(tmp_path, started.SD15, "sd15", negative_prompt="bad")
        layers = read_lora(report.output).layers
        assert all(bool(torch.isfinite(layer.up).all()) for layer in layers.values())
        assert sum(float(layer.up.abs().max()) > 0 for layer in layers.values()) > len(layers) / 2
        assert np.array_equal(txt2img("Euler a"), before)
        assert {value.dtype for value in shared.sd_model.model.diffusion_model.parameters()} == types
    finally:
        shared.opts.data["fp8_storage"] = "Disable"
        for _ in range(2):  # the first time after FP8, the WebUI itself loads by way of half precision
            load_afresh(sd_models.select_checkpoint())


@not_in_forge
def test_what_cannot_be_trained_is_refused_before_anything_is_touched(webui, tmp_path, monkeypatch):
    from modules import sd_models, shared

    def refused(words):
        with pytest.raises(SpoError, match=words):
            seam.webui.refuse_training(seam.webui.loaded_checkpoint())
        monkeypatch.undo()

    model = load(started.SD15)
    monkeypatch.setattr(shared.cmd_opts, "lowvram", True)
    monkeypatch.setattr(model, "lowvram", True)
    refused("--lowvram")
    for flag, words in (("is_sd3", "not SD1.5 or SDXL"), ("is_sd2", "Stable Diffusion 2")):
        monkeypatch.setattr(model, flag, True)
        refused(words)
    first = model.model.diffusion_model.input_blocks[0][0]
    monkeypatch.setattr(first, "weight", torch.nn.Parameter(torch.zeros(32, 9, 3, 3)))
    refused("9 channels")
    xl = load(started.SDXL)
    others = [embedder for embedder in xl.conditioner.embedders if "CLIP" not in type(embedder).__name__]
    refiner = SimpleNamespace(
        model=xl.model, conditioner=SimpleNamespace(embedders=others), is_sdxl=True,
        sd_checkpoint_info=xl.sd_checkpoint_info,
    )  # fmt: skip
    monkeypatch.setattr(sd_models.model_data, "sd_model", refiner)
    refused("refiner")
    monkeypatch.setattr(sd_models.model_data, "sd_model", None)
    refused("No checkpoint")
