"""Stages "vae" and "encode": the f8 autoencoder, and the pictures as latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from recipes.demo_checkpoint.networks import SCALE_FACTOR, build_vae, load_vae, parameter_count, save_vae
from recipes.demo_checkpoint.options import Options
from recipes.demo_checkpoint.pictures import SIZE_PX, load_pictures, saturate, save_grid, to_pixels
from recipes.demo_checkpoint.steps import learning_rate, precision_of, run_steps, updated
from recipes.demo_checkpoint.taken import read_vae


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring-pixel differences."""
    difference = a - b
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def vae_loss(reconstruction: torch.Tensor, pixels: torch.Tensor, posterior: Any) -> torch.Tensor:
    """L1 at three scales + gradients + a KL term just large enough to keep the latents smooth."""
    loss = (reconstruction - pixels).abs().mean() + 0.5 * gradient_loss(reconstruction, pixels)
    for factor in (2, 4):
        loss = loss + 0.5 * (F.avg_pool2d(reconstruction, factor) - F.avg_pool2d(pixels, factor)).abs().mean()
    return loss + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()


def colour_loss(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Squared error of chroma (red-green, yellow-blue) and of colour at a quarter and an eighth of the size.

    L1 alone is content with the median colour: without this, red and green came out brown.
    """
    difference = reconstruction - pixels
    red, green, blue = difference.unbind(1)
    chroma = torch.stack([red - green, 0.5 * (red + green) - blue], 1)
    loss = 2.0 * chroma.square().mean()
    for factor in (4, 8):
        loss = loss + 2.0 * F.avg_pool2d(chroma, factor).square().mean()
        loss = loss + 4.0 * F.avg_pool2d(difference, factor).square().mean()
    return loss


def train_vae(options: Options) -> None:
    """vae.pt: --vae-steps steps of 16 pictures; high saturations leave room for vivid ones. Or --checkpoint's."""
    if options.checkpoint:
        kept = read_vae(options.checkpoint)
        save_vae(kept, options.work / "vae.pt")
        return draw_reconstructions(options, kept)
    device = options.place
    pictures = load_pictures(options.work).flatten(0, 2)
    torch.manual_seed(0)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    print(f"VAE: {parameter_count(vae) / 1e6:.2f} M parameters, {len(pictures)} pictures", flush=True)

    def step(number: int) -> dict[str, float]:
        pixels = to_pixels(pictures[torch.randint(len(pictures), (16,))])
        pixels = saturate(pixels, torch.empty(16).uniform_(0.3, 1.6)).to(device)
        noise = torch.randn(16, 4, SIZE_PX // 8, SIZE_PX // 8).to(device)
        with updated(optimizer, vae, learning_rate(number / options.vae_steps, 1e-3)) as backward:
            with precision_of(device):
                posterior = vae.encode(pixels).latent_dist
                reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
            reconstruction = reconstruction.float()
            colour = colour_loss(reconstruction, pixels)
            loss = vae_loss(reconstruction, pixels, posterior) + colour
            backward(loss)
        l1 = (reconstruction.detach() - pixels).abs().mean()
        return {"loss": loss.item(), "L1": l1.item(), "colour": colour.item()}

    objects = {"vae": vae, "optimizer": optimizer}
    run_steps("vae", options.vae_steps, objects, step, work=options.work, save_every=options.save_every)
    save_vae(vae.cpu(), options.work / "vae.pt")
    draw_reconstructions(options, vae)


@torch.no_grad()
def draw_reconstructions(options: Options, vae: Any) -> None:
    """reconstructions.png: rows of pictures above their reconstructions."""
    pixels = to_pixels(load_pictures(options.work).flatten(0, 1)[::61][:32, 0])
    decoded = vae.eval().decode(vae.encode(pixels).latent_dist.mean).sample
    columns = 8 if len(pixels) >= 16 else len(pixels)  # whole rows only: the grid is filled from left to right
    pixels, decoded = (images[: len(images) // columns * columns] for images in (pixels, decoded))
    rows = [row for both in zip(pixels.split(columns), decoded.split(columns), strict=True) for row in both]
    save_grid(options.work / "reconstructions.png", torch.cat(rows), columns)
    print(f"L1 of the means' reconstructions {(decoded - pixels).abs().mean():.4f}")


@torch.no_grad()
def encode(options: Options) -> None:
    """latents.pt: posterior means [subjects, 2, VARIANTS, 4, 8, 8] as float16, standardised per channel.

    The same standardisation is folded into the autoencoder's quant_conv and post_quant_conv (vae_folded.pt), so that
    SCALE_FACTOR times its latents has mean 0 and std 1 in each channel, as Stable Diffusion's conventions expect. An
    autoencoder of --checkpoint has that already, and stays as it is: its UNet knows those latents.
    """
    vae = load_vae(options.work, "vae.pt").to(options.place)
    pictures = load_pictures(options.work)
    parts = pictures.flatten(0, 2).split(64)
    means = torch.cat([vae.encode(to_pixels(part).to(options.place)).latent_dist.mean.cpu() for part in parts])
    vae.cpu()
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    print(f"latent means {centre.tolist()} stds {spread.tolist()}")
    if options.checkpoint:
        centre, spread = torch.zeros(4), torch.full((4,), 1 / SCALE_FACTOR)
    factor = 1 / (SCALE_FACTOR * spread)
    vae.quant_conv.weight[:4] *= factor.view(4, 1, 1, 1)
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - centre) * factor
    vae.quant_conv.bias[4:] += 2 * factor.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ centre
    vae.post_quant_conv.weight /= factor.view(1, 4, 1, 1)
    save_vae(vae, options.work / "vae_folded.pt")
    latents = (means - centre.view(1, 4, 1, 1)) / spread.view(1, 4, 1, 1)
    torch.save(latents.half().view(*pictures.shape[:3], 4, 8, 8), options.work / "latents.pt")
