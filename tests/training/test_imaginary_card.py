"""What code sees on a card that is not there; and the real training loop on it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from spo.algorithm.diffusion import scaled_linear_alphas_cumprod, sigma_ladder, timestep_of_sigma
from spo.algorithm.pairs import select_pairs
from spo.config import build_config
from spo.headless.host import load_host
from spo.lora.adapter import Adapter, modules_of_kinds
from spo.preference.clip.step_aware import StepAwareCLIP
from spo.preference.clip.towers import ClipShape, TowerShape
from spo.preference.small_decode import SmallDecode
from spo.training.imaginary_card import KNOWN_BYTES, CardTensor, imaginary_card
from spo.training.loop import train
from spo.training.memory_ruler import Ruler
from tests.tiny_checkpoints import write_tiny_sd15, write_tiny_sdxl
from tests.tiny_networks import tiny_unet


@pytest.fixture
def device():
    with imaginary_card() as device:
        yield device


def unknown(device, *shape):
    return torch.empty(*shape, device=device)


# ---- devices


def test_it_looks_like_cuda_and_asks_cuda_for_nothing(device):
    x = torch.zeros(3, device="cuda")
    for tensor in (x, torch.zeros(3).cuda(), torch.zeros(3).to("cuda:0"), x[1:], x + 1, torch.zeros_like(x), x.data):
        assert isinstance(tensor, CardTensor)
        assert tensor.device == device == torch.device("cuda:0")
        assert tensor.is_cuda and not tensor.is_meta and tensor.get_device() == 0
    assert x.to(device) is x
    assert x.cpu().device.type == x.to("cpu").device.type == "cpu"
    assert torch.zeros(3).device.type == "cpu"
    assert not torch.cuda.is_initialized()


def test_modules_move_there_and_back(device):
    layer = nn.Linear(3, 4).to(device)
    assert layer.weight.device == device and isinstance(layer.weight, nn.Parameter)
    layer.half()
    assert layer.weight.dtype == torch.float16 and layer.weight.device == device
    layer.to("cpu")
    assert layer.weight.device.type == "cpu" and type(layer.weight) is nn.Parameter


def test_the_meta_device_stays_what_it_is(device):
    with torch.device("meta"):
        layer = nn.Linear(3, 4)
    assert layer.weight.device.type == torch.zeros(1, device=torch.device("meta")).device.type == "meta"
    assert layer.to_empty(device=device).weight.device == device


def test_outside_everything_is_as_before():
    usual = functional.scaled_dot_product_attention
    with imaginary_card():
        assert functional.scaled_dot_product_attention is not usual
        real = functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 8)] * 3)
        assert torch.equal(real, torch.ones(1, 1, 2, 8))
    assert functional.scaled_dot_product_attention is usual
    assert torch.zeros(3, device="meta").device.type == "meta"


def test_large_things_of_the_host_take_no_memory(device):
    parked = torch.zeros(1 << 30, device=device, dtype=torch.float16).to("cpu")  # 2 GiB
    drawn = torch.randn(1 << 29, generator=torch.Generator().manual_seed(0))
    assert float(parked[-1]) == float(drawn[-1]) == 0
    assert float(torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)).std()) == pytest.approx(1, abs=0.1)


# ---- numbers


def test_noise_levels_and_indices_are_known(device):
    alphas = scaled_linear_alphas_cumprod()
    sigmas = sigma_ladder("ddim", 20, alphas)
    on_card = timestep_of_sigma(sigmas.to(device), alphas.to(device))
    assert on_card.device == device
    assert on_card.tolist() == timestep_of_sigma(sigmas, alphas).tolist()
    assert float(sigmas.to(device)[3].double().square()) == float(sigmas[3].double().square())
    rows = torch.arange(5, device=device)
    rows[torch.tensor([1, 3], device=device)] = 10 + torch.arange(2, device=device)
    assert rows.tolist() == [0, 10, 2, 11, 4]
    assert torch.tensor([1.0, 2.0], device=device).tolist() == rows.new_tensor([1, 2]).tolist() == [1, 2]
    assert torch.as_tensor(rows, dtype=torch.float64)[1].item() == 10


def test_what_follows_from_unknown_numbers_is_unknown(device):
    known = torch.zeros(3, device=device)
    known += unknown(device, 3)
    assert float(known[0]) == 1.0  # as any number that is not known
    known = torch.zeros(3, device=device)
    known.add_(2)
    assert float(known[0]) == 2.0


def test_a_large_tensor_is_never_known(device):
    assert float(torch.zeros(KNOWN_BYTES, device=device)[0]) == 1.0
    assert torch.zeros(KNOWN_BYTES, device=device).cpu().sum() == 0


def test_checks_for_finite_numbers_pass(device):
    for shape in ((3,), (2, 4, 256, 256)):
        x = unknown(device, *shape)
        assert bool(torch.isfinite(x).all()) and not bool(torch.isnan(x).any()) and not bool(torch.isinf(x).any())
        assert not bool((x == float("inf")).any()) and torch.equal(x, x)
        assert not torch.equal(x, unknown(device, *shape))
    norm = nn.utils.clip_grad_norm_([nn.Parameter(unknown(device, 3))], 1.0)
    assert float(norm) == float(norm)


def test_every_pair_is_kept_and_no_two_latents_are_the_same(device):
    selection = select_pairs(unknown(device, 4, 3), 0.3)
    assert selection.kept.tolist() == [True] * 3
    assert selection.kept.nonzero()[:, 0].tolist() == [0, 1, 2]
    latents = unknown(device, 3, 4, 64, 64)
    same = (latents == unknown(device, 3, 4, 64, 64)).flatten(1).all(1)
    assert same.tolist() == [False] * 3
    assert latents[selection.kept].shape == latents.shape
    assert latents[~selection.kept].shape == (0, 4, 64, 64)
    assert latents[latents > 0].shape == (3 * 4 * 64 * 64,)


def test_what_a_number_decides_in_another_way_is_refused(device):
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.unique(unknown(device, 3))


# ---- gradients


def test_gradients_and_checkpoints(device):
    layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).to(device)
    x = unknown(device, 2, 8)
    for use in (layer, lambda x: checkpoint(layer, x, use_reentrant=False, preserve_rng_state=True)):
        layer.zero_grad()
        use(x).sum().backward(inputs=list(layer.parameters()))
        assert layer[0].weight.grad.shape == (8, 8) and layer[0].weight.grad.device == device


def test_a_loss_scaler_finds_no_infinity(device, monkeypatch):
    """Where there is no CUDA it turns itself off; so it is told that there is."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    if hasattr(torch.amp, "GradScaler"):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        scaler = torch.amp.GradScaler("cuda")
    else:
        monkeypatch.setattr("torch.cuda.amp.grad_scaler.amp_definitely_not_available", lambda: False)
        scaler = torch.cuda.amp.GradScaler()
    layer = nn.Linear(8, 8).to(device)
    optimizer = torch.optim.AdamW(layer.parameters())
    scaler.scale(layer(unknown(device, 2, 8)).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert len(optimizer.state) == 2
    assert scaler.is_enabled()


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_an_adapter_leaves_no_trace(device, architecture):
    unet = tiny_unet(architecture).half().to(device)
    with Ruler() as ruler:
        adapter = Adapter(unet, modules_of_kinds(unet, ["attention"]), rank=4, alpha=4)
        assert {parameter.device for parameter in adapter.parameters()} == {device}
        assert ruler.current_bytes == 4 * sum(parameter.numel() for parameter in adapter.parameters())
        with adapter.off():
            pass
        adapter.weights()
        adapter.remove()
        del adapter
        gc.collect()  # layers of peft's hold one another
        assert ruler.current_bytes == 0


# ---- the real loop


def small_clip() -> StepAwareCLIP:
    tower = TowerShape(64, 128, 2, 2)
    return StepAwareCLIP(ClipShape(tower, tower, 49408, 8, 32, 16)).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "inner_steps"), [("sd15", 0), ("sdxl", 1)])
def test_training_runs_on_it_from_checkpoint_to_lora(tmp_path, architecture, inner_steps):
    """Loader, prompts, adapter, rollout with decoded candidates, loss, optimizer, state, file: nothing is adapted."""
    path = tmp_path / "tiny.safetensors"
    (write_tiny_sd15 if architecture == "sd15" else write_tiny_sdxl)(path)
    values = {
        "checkpoint": str(path),
        "output": str(tmp_path / "a.safetensors"),
        "device": "cuda:0",
        "width": 64,
        "height": 128,
        "sampling_steps": 3,
        "divert_start_step": 1,
        "candidates": 2,
        "inner_steps": inner_steps,
        "prompts_per_batch": 1,
        "steps": 1,
        "gradient_checkpointing": True,
    }
    config = build_config(values, architecture)
    with imaginary_card() as device, Ruler() as ruler, pytest.warns(UserWarning, match="CUDA is not available"):
        host = load_host(config)
        assert host.network.dtype == torch.float16 and host.device == device
        ruler.weights(host.network)
        preference = SmallDecode(small_clip().to(device), lambda text: None, image_px=32)
        report = train(host, config, ["a fox"], preference)
        assert report.finished and report.output is not None and report.output.exists()
        assert ruler.peak_bytes > 0 and ruler.weights_bytes > 0
    assert not torch.cuda.is_initialized()
