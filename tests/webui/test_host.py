"""The loaded checkpoint of a real WebUI 1.10.1 as a host, in this process. Runs where SPO_WEBUI_DIR names one.

The WebUI's own python runs this, on its tiny checkpoints:

    SPO_WEBUI_DIR=<webui> python -m pytest tests/webui
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spo.config import build_config
from spo.lora_file import read_lora
from spo.trainer import train
from tests.tiny_host import MeanOfChannel

WEBUI = os.environ.get("SPO_WEBUI_DIR")
pytestmark = pytest.mark.skipif(not WEBUI, reason="SPO_WEBUI_DIR does not name a WebUI")
CHECKPOINTS = [("tiny-sd1", "sd15"), ("tiny-sdxl", "sdxl")]
PROMPT = "a (red:1.3) [fox:boat:0.5] AND a pear :0.6"


@pytest.fixture(scope="module")
def webui():
    """The WebUI's modules, loaded as its own start does, on the CPU and without its server."""
    former = os.getcwd(), list(sys.argv)
    os.chdir(str(WEBUI))
    sys.path.insert(0, str(WEBUI))
    flags = "--skip-torch-cuda-test --use-cpu all --no-half --precision full --no-hashing --disable-nan-check --nowebui"
    sys.argv = ["launch.py", "--skip-prepare-environment", "--do-not-download-clip", *flags.split()]
    from modules import initialize

    initialize.imports()
    initialize.check_versions()
    initialize.initialize()
    from spo.webui import sampler

    sampler.register()
    yield
    os.chdir(former[0])
    sys.argv = former[1]


def load(name):
    from modules import sd_models, shared

    info = next(info for info in sd_models.checkpoints_list.values() if name in info.name)
    shared.opts.data["sd_model_checkpoint"] = info.title
    if sd_models.model_data.sd_model:
        sd_models.reload_model_weights(info=info)
    return sd_models.model_data.get_sd_model()


def txt2img(sampler_name, *, prompt=PROMPT, seed=7, scheduler="Karras"):
    from modules import processing, shared

    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=shared.sd_model, prompt=prompt, negative_prompt="bad", seed=seed, steps=8, cfg_scale=5, width=128,
        height=128, sampler_name=sampler_name, scheduler=scheduler, batch_size=2, do_not_save_samples=True,
        do_not_save_grid=True,
    )  # fmt: skip
    try:
        return np.stack([np.asarray(image) for image in processing.process_images(p).images[-2:]]).astype(int)
    finally:
        p.close()


def config_for(folder: Path, name, architecture, **changes):
    values = {
        "checkpoint": name,
        "prompts": "prompts.txt",
        "output": str(folder / f"{name}.safetensors"),
        "width": 128,
        "height": 128,
        "sampling_steps": 6,
        "divert_start_step": 1,
        "threshold": 0.0,
        "prompts_per_batch": 2,
        "pairs_per_update": 4,
        "steps": 3,
        "learning_rate": 1e-2,
        "save_every": 0,
        "rank": 4,
        "save_precision": "float32",
    }
    return build_config({**values, **changes}, architecture)


@pytest.mark.parametrize("scheduler", ["Automatic", "Karras"])
@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS)
def test_one_candidate_is_euler_a(webui, name, architecture, scheduler):
    load(name)
    euler, spo = txt2img("Euler a", scheduler=scheduler), txt2img("SPO", scheduler=scheduler)
    assert euler.std() > 5
    assert np.abs(euler - spo).max() <= 1


@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS)
def test_training_borrows_the_model_and_gives_it_back(webui, tmp_path, name, architecture):
    from spo.webui.host import WebUIHost, architecture_of

    model = load(name)
    assert architecture_of(model) == architecture
    before = txt2img("Euler a")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    tree = [(key, id(module), module.training) for key, module in model.named_modules()]
    flags = [(key, parameter.requires_grad) for key, parameter in model.named_parameters()]
    config = config_for(tmp_path, name, architecture)
    report = train(WebUIHost(config), config, ["a (red:1.3) fox", "[a boat:a pear:0.5] on a lake"], MeanOfChannel())

    assert report.finished
    layers = read_lora(report.output).layers
    assert all(float(layer.up.abs().max()) > 0 or "attn1" in key for key, layer in layers.items())
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert [(key, id(module), module.training) for key, module in model.named_modules()] == tree
    assert [(key, parameter.requires_grad) for key, parameter in model.named_parameters()] == flags
    assert np.array_equal(txt2img("Euler a"), before)


@pytest.mark.parametrize(("name", "architecture"), CHECKPOINTS)
def test_the_training_step_sees_what_the_sampler_saw(webui, tmp_path, name, architecture):
    """`denoise` at a step of the rollout equals the CFG denoiser there: weights, editing, AND, guidance."""

    from spo.webui.host import WebUIHost

    load(name)
    config = config_for(tmp_path, name, architecture, negative_prompt="bad")
    host = WebUIHost(config)
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
        from spo.rollout import RolloutSettings

        host.rollout([PROMPT], [3], RolloutSettings(candidates=1), None, None)
    finally:
        sd_samplers_cfg_denoiser.CFGDenoiser.forward = forward
    for step in (0, 2, 5):
        x, sigma, expected = seen[step]
        with torch.no_grad():
            found = host.denoise(x, sigma, [PROMPT], torch.tensor([step]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
