"""Stages "unet" and "unet_core": text encoder and UNet, trained together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recipes.demo_checkpoint.captions import CaptionedLatents
from recipes.demo_checkpoint.checkpoint import write_checkpoint
from recipes.demo_checkpoint.networks import (
    alphas_cumprod,
    build_text_encoder,
    build_unet,
    encode_text,
    load_networks,
    parameter_count,
)
from recipes.demo_checkpoint.options import Options
from recipes.demo_checkpoint.pictures import core_rows, load_subjects, taught_rows
from recipes.demo_checkpoint.steps import AverageOf, learning_rate, precision_of, run_steps, updated
from recipes.demo_checkpoint.taken import read_text_encoder, read_unet
from spo.files import write_whole


def denoising_loss(
    unet: Any,
    text_encoder: Any,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    alpha_bar: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """Epsilon loss with min-SNR weights (gamma 5, Hang et al. 2023), two stratified timesteps for each picture.

    latents, tokens  on the CPU, where the noise is drawn, too; the networks compute on `device`
    """
    count = len(latents)
    fraction = (torch.rand(count).repeat(2) + torch.tensor([0.0, 0.5]).repeat_interleave(count)) % 1
    t = (fraction * 1000).long().clamp(max=999)
    a = alpha_bar[t].float().view(-1, 1, 1, 1)
    noise = torch.randn(2 * count, *latents.shape[1:])
    noisy = a.sqrt() * latents.repeat(2, 1, 1, 1) + (1 - a).sqrt() * noise
    context = encode_text(text_encoder, tokens.to(device)).repeat(2, 1, 1)
    predicted = unet(noisy.to(device), t.to(device), context).sample.float()
    error = (predicted - noise.to(device)).square().mean((1, 2, 3))
    snr = (a / (1 - a)).flatten().to(device)
    return (snr.clamp(max=5) / snr * error).mean()


def train_unet(options: Options) -> None:
    """unet_all.pt: both networks trained for --unet-steps on all subjects that are taught, their weights averaged; or
    --checkpoint's."""
    if options.checkpoint:
        networks = {"unet": read_unet(options.checkpoint), "text_encoder": read_text_encoder(options.checkpoint)}
        weights = torch.nn.ModuleDict(networks).state_dict()
        return write_whole(options.work / "unet_all.pt", lambda temporary: torch.save(weights, temporary))
    torch.manual_seed(0)
    rows = taught_rows(load_subjects(options.work))
    fit_unet(options, "unet", options.unet_steps, CaptionedLatents(options, rows), build_unet(), build_text_encoder())


def train_unet_core(options: Options) -> None:
    """unet.pt: on from the averaged weights with the core subjects alone, for --core-steps: fewer, but learned well."""
    unet, text_encoder = load_networks(options.work, "unet_all.pt")
    unet.train().requires_grad_(True)
    text_encoder.train().requires_grad_(True)
    rows = core_rows(load_subjects(options.work))
    fit_unet(options, "unet_core", options.core_steps, CaptionedLatents(options, rows), unet, text_encoder)


def fit_unet(
    options: Options, stage: str, steps: int, examples: CaptionedLatents, unet: Any, text_encoder: Any
) -> None:
    device = options.place
    networks = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)
    average = AverageOf(networks)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    alpha_bar = alphas_cumprod()
    print(
        f"parameters: UNet {parameter_count(unet)}, text encoder {parameter_count(text_encoder)}; "
        f"{len(examples.rows)} subjects, {len(examples.tokens)} captions",
        flush=True,
    )

    def step(number: int) -> dict[str, float]:
        latents, tokens = examples.draw(options.batch // 2, np.random.default_rng(torch.initial_seed()))
        with updated(optimizer, networks, learning_rate(number / steps, options.unet_lr)) as backward:
            with precision_of(device):
                loss = denoising_loss(unet, text_encoder, latents, tokens, alpha_bar, device)
            backward(loss)
        average.update(number + 1)
        return {"loss": loss.item()}

    def saved() -> None:
        weights = {name: tensor.cpu() for name, tensor in average.weights.items()}
        for name in ("unet.pt", *(["unet_all.pt"] if stage == "unet" else [])):
            write_whole(options.work / name, lambda temporary: torch.save(weights, temporary))
        export_snapshot(options)

    objects = {"networks": networks, "average": average, "optimizer": optimizer}
    run_steps(stage, steps, objects, step, work=options.work, save_every=options.save_every, saved=saved)


def export_snapshot(options: Options) -> None:
    if options.snapshots:
        write_checkpoint(options, options.snapshots)
