"""Loaded networks against those that the tiny checkpoints were made of, and against diffusers' loader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spo.checkpoint.inspect import inspect_checkpoint
from spo.errors import SpoError
from spo.headless import weights
from spo.headless.model import DiffusersModel
from tests.headless_models import (
    PROMPTS,
    SIZE,
    assert_same_weights,
    inputs,
    load,
    other_vae,
)
from tests.tiny_checkpoints import (
    tiny_sd15,
    tiny_sdxl,
    write_diffusers_folder,
    write_tiny_sd15,
    write_tiny_sdxl,
    write_vae,
)


def test_networks_are_frozen_and_eval(sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    for model in (sd15, sdxl):
        model.vae.use("encoder")
        for network in (model.unet, model.vae.network, *model.text_encoders.networks):
            assert not network.training and not any(p.requires_grad for p in network.parameters())
            assert not any(t.is_meta for t in (*network.parameters(), *network.buffers()))


@pytest.mark.parametrize(
    "kind", ["pickle", "folder", "fp16 folder", "sharded folder", "old names", "other sizes", "float32"]
)
def test_other_ways_to_the_same_sd15(tmp_path: Path, kind: str) -> None:
    source = tiny_sd15()
    if kind == "pickle":
        path = write_tiny_sd15(tmp_path / "tiny.ckpt")
    elif kind == "float32":
        path = write_tiny_sd15(tmp_path / "tiny.safetensors", dtype=torch.float32)
    elif kind == "old names":  # as merges made by early diffusers scripts, which the WebUI also reads
        tensors = load_file(write_tiny_sd15(tmp_path / "new.safetensors"))
        path = tmp_path / "old.safetensors"
        save_file({name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}, path)
    elif kind == "other sizes":
        sizes: dict[str, Any] = {"channels": (64, 96), "depths": (1, 2), "res_blocks": 2, "heads": 8, "linear": True,
                                 "text_width": 64, "text_layers": 2, "vae_channels": (32, 32, 64)}  # fmt: skip
        path, source = write_tiny_sd15(tmp_path / "s.safetensors", seed=4, **sizes), tiny_sd15(4, **sizes)
    else:
        path = write_diffusers_folder(tmp_path / "model", source)
        if kind == "fp16 folder":
            weights = path / "unet" / "diffusion_pytorch_model.safetensors"
            weights.rename(weights.with_suffix(".fp16.safetensors"))
        if kind == "sharded folder":
            (path / "unet/diffusion_pytorch_model.safetensors").unlink()
            source.unet.save_pretrained(path / "unet", max_shard_size="3MB")
            assert len(list((path / "unet").glob("*.safetensors"))) > 1
    model = load(path)
    assert_same_weights(model, source)
    x, timesteps, conditioning = inputs(model)
    expected = source.unet(x, timesteps, conditioning.cross_attention).sample
    assert torch.equal(model.predict(x, timesteps, conditioning), expected)


def test_sdxl_folder_and_old_vae_names(tmp_path: Path, sdxl: DiffusersModel) -> None:
    path = write_diffusers_folder(tmp_path / "model", tiny_sdxl())
    weights = path / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for new, old in {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, weights)  # as in the published SD1.5 and sd-vae-ft folders
    model = load(path)
    assert_same_weights(model, tiny_sdxl())
    x, timesteps, conditioning = inputs(model)
    assert torch.equal(model.predict(x, timesteps, conditioning), sdxl.predict(*inputs(sdxl)))
    assert torch.equal(model.decoder.decode(x), sdxl.decoder.decode(x))
    config = json.loads((path / "vae/config.json").read_text())
    (path / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert inspect_checkpoint(path).scale_factor == load(path).vae.network.config.scaling_factor == 0.5


@pytest.fixture(scope="module")
def sd15_pipeline(sd15_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from diffusers import StableDiffusionPipeline

    config = write_diffusers_folder(tmp_path_factory.mktemp("c") / "model", tiny_sd15())
    for weights_path in config.rglob("*.safetensors"):
        weights_path.unlink()
    pipeline = StableDiffusionPipeline.from_single_file(
        str(sd15_path), config=str(config), local_files_only=True, safety_checker=None, torch_dtype=torch.float32
    )
    if not hasattr(pipeline.text_encoder, "text_model"):  # diffusers 0.42's clip skip has not met transformers 5 yet
        pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder
    return pipeline


def test_sd15_against_diffusers_single_file_loader(sd15: DiffusersModel, sd15_pipeline: Any) -> None:
    x, timesteps, conditioning = inputs(sd15)
    expected, _ = sd15_pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(conditioning.cross_attention, expected)
    output = sd15_pipeline.unet(x, timesteps, expected).sample
    assert torch.equal(sd15.predict(x, timesteps, conditioning), output)
    latents = sd15_pipeline.vae.encode(torch.ones(1, 3, 64, 64)).latent_dist.mean * 0.18215
    assert torch.equal(sd15.vae.encode(torch.ones(1, 3, 64, 64)), latents)
    assert torch.allclose(sd15.alphas_cumprod, sd15_pipeline.scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip_skip", [2, 3])
def test_clip_skip_against_diffusers(sd15: DiffusersModel, sd15_pipeline: Any, clip_skip: int) -> None:
    expected, _ = sd15_pipeline.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=clip_skip - 1)  # they count from 0
    features = sd15.text_encoders.encode(PROMPTS, clip_skip=clip_skip, **SIZE).cross_attention
    assert torch.equal(features, expected)
    assert not torch.equal(features, sd15.text_encoders.encode(PROMPTS, **SIZE).cross_attention)


def test_text_encoder_heads_matter(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "x.safetensors", text_heads=4)
    source = tiny_sd15(text_heads=4)
    ids = torch.full((1, 77), 49407)
    ids[0, :3] = torch.tensor([49406, 320, 1125])
    expected = source.text_encoders[0](input_ids=ids).last_hidden_state
    prompt = ["a photo"]
    wrong = load(path).text_encoders.encode(prompt, **SIZE).cross_attention
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    (tmp_path / "x.text_encoder_config.json").write_text(json.dumps(sizes))
    right = load(path).text_encoders.encode(prompt, **SIZE).cross_attention
    assert torch.equal(right, expected) and not torch.allclose(wrong, expected, atol=1e-3)


def test_unet_heads_from_a_yaml(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "x.safetensors", heads=4)
    path.with_suffix(".yaml").write_text("model: {params: {unet_config: {params: {num_heads: 4}}}}")
    model = load(path)
    x, timesteps, conditioning = inputs(model)
    expected = tiny_sd15(heads=4).unet(x, timesteps, conditioning.cross_attention).sample
    assert torch.equal(model.predict(x, timesteps, conditioning), expected)


@pytest.mark.parametrize("kind", ["file", "prefix", "pickle", "folder", "model folder", "whole checkpoint"])
def test_vae_override(tmp_path: Path, sdxl_path: Path, kind: str) -> None:
    source = other_vae()
    if kind == "file":
        vae_path = write_vae(tmp_path / "vae.safetensors", source)
    elif kind == "prefix":
        vae_path = write_vae(tmp_path / "vae.safetensors", source, prefix="first_stage_model.")
    elif kind == "pickle":
        vae_path = write_vae(tmp_path / "x.vae.pt", source)
    elif kind == "whole checkpoint":
        vae_path = write_tiny_sd15(tmp_path / "w.safetensors", 7, vae_channels=(32, 64, 64, 64), vae_blocks=2)
    else:
        vae_path = write_diffusers_folder(tmp_path / "model", source) / ("vae" if kind == "folder" else "")
    model = load(sdxl_path, vae_path=vae_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.vae.network.decoder.parameters()} == {torch.float32}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = source.vae.decode(latents / 0.13025).sample  # the checkpoint's scale factor
    assert torch.equal(model.decoder.decode(latents), expected)


def test_a_checkpoint_without_vae_takes_one(tmp_path: Path) -> None:
    path = write_tiny_sd15(tmp_path / "bare.safetensors", leave_out=("first_stage_model.",))
    with pytest.raises(SpoError, match="holds no VAE: give one"):
        load(path)
    model = load(path, vae_path=write_vae(tmp_path / "vae.safetensors", other_vae()))
    assert model.decoder.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 64, 64)
    path = write_tiny_sd15(tmp_path / "bare2.safetensors", leave_out=("cond_stage_model.",))
    with pytest.raises(SpoError, match="holds no text encoder"):
        load(path)


def test_vae_precision(sd15_path: Path) -> None:
    """On a CPU float32 beside every precision of the UNet, unless it is asked for."""
    assert load(sd15_path, dtype=torch.bfloat16).vae.dtype == torch.float32
    model = load(sd15_path, dtype=torch.bfloat16, vae_dtype=torch.float16)
    assert {p.dtype for p in model.vae.network.decoder.parameters()} == {torch.float16}


def test_wrong_vaes(tmp_path: Path, sd15_path: Path) -> None:
    def refused(vae_path: Path, message: str) -> None:
        with pytest.raises(SpoError, match=message):
            load(sd15_path, vae_path=vae_path)

    path = tmp_path / "x.safetensors"
    refused(tmp_path / "none.pt", "there is no file")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, path)
    refused(path, '"x.safetensors" is not a VAE')
    tensors = load_file(write_vae(tmp_path / "vae.safetensors", other_vae()))
    save_file({name: tensor for name, tensor in tensors.items() if "quant" not in name}, path)
    refused(path, "without quant_conv")
    save_file(tensors | {"post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}, path)
    refused(path, "16 latent channels")
    save_file({name: tensor for name, tensor in tensors.items() if "decoder.norm_out" not in name}, path)
    refused(path, r"VAE in x.safetensors is incomplete: 2 tensors are missing, such as decoder.conv_norm_out")
    save_file(tensors | {"decoder.conv_out.weight": torch.zeros(3, 5, 3, 3)}, path)
    refused(path, r"does not fit: decoder.conv_out.weight has the shape \[3, 5, 3, 3\] where \[3, 32, 3, 3\]")
    save_file(other_vae().vae.state_dict(), path)
    refused(path, "has diffusers names: give the folder")
    refused(tmp_path, "has no config.json")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    shutil.copy(path, tmp_path / "diffusion_pytorch_model.safetensors")
    refused(tmp_path, "holds a AutoencoderTiny, not a Stable Diffusion VAE")


def test_alphas_cumprod(tmp_path: Path, sd15: DiffusersModel, sdxl: DiffusersModel) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    expected = (1 - betas).cumprod(0).float()
    for model in (sd15, sdxl):  # the tiny SD1.5 file holds a rounded table, the SDXL file none
        assert model.alphas_cumprod.dtype == torch.float32 and torch.equal(model.alphas_cumprod, expected)
        assert not model.zero_terminal_snr

    path = write_tiny_sd15(tmp_path / "x.safetensors")
    tensors = load_file(path)
    other = (1 - betas * 1.1).cumprod(0).float()
    save_file(tensors | {"alphas_cumprod": other}, path)
    assert torch.equal(load(path).alphas_cumprod, other)
    save_file(tensors | {"alphas_cumprod": other[:500].clone()}, path)
    with pytest.raises(SpoError, match=r"schedule of the shape \[500\]"):
        load(path)
    del tensors["alphas_cumprod"]
    save_file(tensors, path)
    path.with_suffix(".yaml").write_text("model: {params: {linear_start: 0.001, linear_end: 0.01}}")
    betas = torch.linspace(0.001**0.5, 0.01**0.5, 1000, dtype=torch.float64).square()
    assert torch.equal(load(path).alphas_cumprod, (1 - betas).cumprod(0).float())


def test_zero_terminal_snr(tmp_path: Path, sdxl: DiffusersModel) -> None:
    from diffusers import DDIMScheduler

    path = write_tiny_sdxl(tmp_path / "x.safetensors")
    save_file(load_file(path) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    model = load(path)
    assert model.prediction_type == "v_prediction" and model.zero_terminal_snr
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    assert torch.allclose(model.alphas_cumprod[:-1], scheduler.alphas_cumprod[:-1], rtol=1e-3, atol=1e-6)
    assert model.alphas_cumprod[-1] == torch.tensor(4.8973451890853435e-08)  # the WebUI's number
    model = load(path, prediction_type="epsilon")
    assert torch.equal(model.alphas_cumprod, sdxl.alphas_cumprod)


def test_memory_bytes(sdxl_path: Path) -> None:
    """The text encoders and the VAE's encoder are not in memory before they are needed."""
    model = load(sdxl_path)
    decoder = sum(tensor.numel() for name, tensor in model.vae.network.named_parameters() if not tensor.is_meta)
    assert model.memory_bytes() == pytest.approx(4 * (model.info.unet_parameters + decoder), rel=0.01)
    assert decoder < 0.7 * model.info.vae_parameters
    model.text_encoders, model.vae.use("encoder")
    assert model.memory_bytes() == pytest.approx(4 * model.info.parameters, rel=0.01)


def test_memory_that_runs_out_is_said(sd15_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(weights.Source, "fill", fail)
    with pytest.raises(SpoError, match="Out of memory while tiny.safetensors was loaded onto cpu: choose precision"):
        load(sd15_path)
