"""A random checkpoint of full size in a real WebUI: load, one rollout and one update at 64 px, the LoRA applied.

Runs where SPO_WEBUI_DIR names a WebUI and SPO_FULL_SIZE_DIR a folder with sd15.safetensors or sdxl.safetensors. SD1.5
is in float32, SDXL in bfloat16, cast by hand as on GTX 16xx: in float32 it takes 14 GB.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from spo.lora.read import read_lora
from spo.training.loop import train
from tests.headless.test_full_size import largest_resident_bytes
from tests.tiny_host import MeanOfChannel
from tests.webui import test_host as host

webui = host.webui
FOLDER = os.environ.get("SPO_FULL_SIZE_DIR", "")
pytestmark = pytest.mark.skipif(
    not (FOLDER and os.environ.get("SPO_WEBUI_DIR")), reason="SPO_WEBUI_DIR and SPO_FULL_SIZE_DIR name no folders"
)
MODULES = {"sd15": 128, "sdxl": 560}
TOKENIZER = Path(__file__).parents[2] / "spo" / "clip_tokenizer"
CLIP_L = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768,
    "max_position_embeddings": 77, "vocab_size": 49408,
}  # fmt: skip


@pytest.fixture(params=list(MODULES))
def full_size(request, webui, tmp_path, monkeypatch):
    """The architecture, with its checkpoint loaded as the dropdown does; largest resident bytes before and at load."""
    from modules import devices, sd_models, shared
    from omegaconf import OmegaConf

    source = Path(FOLDER) / f"{request.param}.safetensors"
    if not source.exists():
        pytest.skip(f"there is no {source}")
    clip = tmp_path / "clip"
    shutil.copytree(TOKENIZER, clip)
    (clip / "config.json").write_text(json.dumps(CLIP_L))
    checkpoint = tmp_path / source.name
    checkpoint.symlink_to(source)
    root = Path(str(host.WEBUI))
    if request.param == "sd15":
        config = OmegaConf.load(root / "configs" / "v1-inference.yaml")
        config.model.params.cond_stage_config.params = {"version": str(clip)}
    else:
        folder = root / "repositories" / "generative-models" / "configs" / "inference"
        config = OmegaConf.load(folder / "sd_xl_base.yaml")
        config.model.params.conditioner_config.params.emb_models[0].params.version = str(clip)
    OmegaConf.save(config, checkpoint.with_suffix(".yaml"))
    host.load("tiny-sd1")
    info = sd_models.CheckpointInfo(str(checkpoint))
    info.register()
    with monkeypatch.context() as patch:
        if request.param == "sdxl":
            patch.setattr(shared.cmd_opts, "no_half", False)
            patch.setattr(torch.nn.Module, "half", torch.nn.Module.bfloat16)
            patch.setattr(devices, "cuda_no_autocast", lambda: True)
            for name in ("dtype", "dtype_inference"):
                patch.setattr(devices, name, torch.bfloat16)
        largest_resident_bytes()
        before = largest_resident_bytes()
        began = time.monotonic()
        model = sd_models.reload_model_weights(info=info)
        if request.param == "sdxl":
            patch.setattr(devices, "dtype_unet", torch.bfloat16)
        print(
            f"\n{request.param}: file {source.stat().st_size / 1e9:.2f} GB; the WebUI loads it in "
            f"{time.monotonic() - began:.0f} s, resident {before / 1e9:.2f} GB before, at most "
            f"{largest_resident_bytes() / 1e9:.2f} meanwhile, {largest_resident_bytes() / 1e9:.2f} afterwards"
        )
        yield request.param, model
    host.load("tiny-sd1")
    sd_models.list_models()


def picture(prompt):
    return host.txt2img("Euler a", prompt=prompt, size=64, steps=2, pictures=1)


def test_one_rollout_and_one_update_at_full_size(full_size, tmp_path):
    import networks
    from modules import shared

    from spo.webui.host import borrowed

    architecture, model = full_size
    changes = {
        "checkpoint": model.sd_checkpoint_info.filename, "width": 64, "height": 64, "steps": 1, "sampling_steps": 3,
        "candidates": 2, "inner_steps": 0, "prompts_per_batch": 1, "pairs_per_update": 1, "accumulation": 1,
        "divert_start_step": 1, "threshold": 0.0, "negative_prompt": "bad", "rank": 4,
        "output": str(tmp_path / "spo-test-full-size.safetensors"),
    }  # fmt: skip
    config = host.config_for(tmp_path, architecture, architecture, **changes)
    weights = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # the hijack names some twice
    weights_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    began = time.monotonic()
    with borrowed(config, training=True) as lent:
        report = train(lent, config, ["a fox"], MeanOfChannel())
    print(
        f"weights {weights_bytes / 1e9:.2f} GB, {next(model.model.diffusion_model.parameters()).dtype}; rollout and "
        f"update {time.monotonic() - began:.0f} s, resident at most {largest_resident_bytes() / 1e9:.2f} GB"
    )
    assert report.finished
    layers = read_lora(report.output).layers
    assert len(layers) == MODULES[architecture]
    exported = Path(shared.cmd_opts.lora_dir) / report.output.name
    exported.write_bytes(report.output.read_bytes())
    networks.list_available_networks()
    try:
        network = networks.load_network(exported.stem, networks.available_networks[exported.stem])
        assert len(network.modules) == MODULES[architecture]  # the WebUI knows every one of them
        plain = picture("a fox")
        assert not np.array_equal(picture(f"a fox <lora:{exported.stem}:40>"), plain)
        assert np.array_equal(picture("a fox"), plain)
    finally:
        exported.unlink()
        networks.list_available_networks()
