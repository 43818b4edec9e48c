"""SDXL at 1024 px on the imaginary card against what FakeTensorMode counted of the same networks (PyTorch 2.13,
diffusers 0.42): GiB of tensors beside the weights, float16."""

from __future__ import annotations

import pytest
import torch

from spo.training.imaginary_card import imaginary_card
from spo.training.memory_ruler import GIB, Ruler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unet():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    with imaginary_card() as device:
        return network.half().requires_grad_(False).to_empty(device=device)


def run(unet, device, latents: int) -> None:
    """Forward, and where gradients are on, backward to the latents."""
    gradient = torch.is_grad_enabled()
    half = {"device": device, "dtype": torch.float16}
    x = torch.empty(latents, 4, 128, 128, **half, requires_grad=gradient)
    text = torch.empty(latents, 77, 2048, **half, requires_grad=gradient)
    sizes = {"text_embeds": torch.empty(latents, 1280, **half), "time_ids": torch.empty(latents, 6, device=device)}
    output = unet(x, torch.full((latents,), 500, device=device), text, added_cond_kwargs=sizes).sample
    if gradient:
        output.float().square().mean().backward()


@pytest.mark.parametrize(
    ("latents", "work", "expected_gib"),
    [
        (2, "forward", 0.31),
        (8, "forward", 1.23),
        (2, "backward", 10.0),
        (2, "checkpointed", 1.17),
        (8, "checkpointed", 4.70),
    ],
)
def test_the_network(unet, latents, work, expected_gib):
    unet.train(work == "checkpointed")
    (unet.enable_gradient_checkpointing if work == "checkpointed" else unet.disable_gradient_checkpointing)()
    with imaginary_card() as device, Ruler() as ruler, torch.set_grad_enabled(work != "forward"):
        ruler.weights(unet)
        run(unet, device, latents)
        assert ruler.peak_bytes / GIB == pytest.approx(expected_gib, rel=0.02)
        assert ruler.weights_bytes / GIB == pytest.approx(4.78, rel=0.01)


@pytest.mark.parametrize(("dtype", "expected_gib"), [(torch.float32, 3.0), (torch.float16, 1.5)])
def test_the_decode_of_one_picture(dtype, expected_gib):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    with imaginary_card() as device, Ruler() as ruler, torch.no_grad():
        vae = vae.to(dtype).to_empty(device=device)
        ruler.weights(vae)
        picture = vae.decode(torch.empty(1, 4, 128, 128, device=device, dtype=dtype)).sample
        assert picture.shape == (1, 3, 1024, 1024)
        assert ruler.peak_bytes / GIB == pytest.approx(expected_gib, rel=0.02)
        assert ruler.peak.workspace_bytes / GIB == pytest.approx(expected_gib * 7 / 12, rel=0.02)
