"""Stages "unet" and "unet_core": text encoder and UNet, trained together."""

from __future__ import annotations

import time
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
    learning_rate,
    load_networks,
    parameter_count,
)
from recipes.demo_checkpoint.options import Options
from recipes.demo_checkpoint.pictures import core_rows, load_subjects, taught_rows


def denoising_loss(
    unet: Any, text_encoder: Any, latents: torch.Tensor, tokens: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """Epsilon loss with min-SNR weights (gamma 5, Hang et al. 2023), two stratified timesteps for each picture."""
    count = len(latents)
    fraction = (torch.rand(count).repeat(2) + torch.tensor([0.0, 0.5]).repeat_interleave(count)) % 1
    t = (fraction * 1000).long().clamp(max=999)
    a = alpha_bar[t].float().view(-1, 1, 1, 1)
    noise = torch.randn(2 * count, *latents.shape[1:])
    noisy = a.sqrt() * latents.repeat(2, 1, 1, 1) + (1 - a).sqrt() * noise
    context = encode_text(text_encoder, tokens).repeat(2, 1, 1)
    error = (unet(noisy, t, context).sample - noise).square().mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    return (snr.clamp(max=5) / snr * error).mean()


def train_unet(options: Options) -> None:
    """Train both networks for --unet-minutes of wall clock (the learning rate follows it), averaging weights."""
    fit_unet(
        options, CaptionedLatents(options, taught_rows(load_subjects(options.work))), build_unet(), build_text_encoder()
    )


def train_unet_core(options: Options) -> None:
    """Go on from the averaged weights with the core subjects alone, for --unet-minutes: fewer, but learned well."""
    unet, text_encoder = load_networks(options.work)
    unet.train().requires_grad_(True)
    text_encoder.train().requires_grad_(True)
    fit_unet(options, CaptionedLatents(options, core_rows(load_subjects(options.work))), unet, text_encoder)


def fit_unet(options: Options, examples: CaptionedLatents, unet: Any, text_encoder: Any) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    networks = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    average = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    optimizer = torch.optim.AdamW(networks.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-2)
    alpha_bar = alphas_cumprod()
    print(
        f"parameters: UNet {parameter_count(unet)}, text encoder {parameter_count(text_encoder)}; "
        f"{len(examples.rows)} subjects, {len(examples.tokens)} captions",
        flush=True,
    )
    started_s, next_snapshot_s, losses = time.time(), 60 * options.snapshot_minutes, []
    step, elapsed_s, limit_s = 0, 0.0, 60 * options.unet_minutes
    while elapsed_s < limit_s:
        optimizer.param_groups[0]["lr"] = learning_rate(elapsed_s / limit_s, options.unet_lr)
        loss = denoising_loss(unet, text_encoder, *examples.draw(options.batch // 2, rng), alpha_bar)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        step += 1
        update_average(average, networks, step)
        losses.append(loss.item())
        elapsed_s = time.time() - started_s
        if step % 100 == 0:
            print(f"step {step}: loss {np.mean(losses[-100:]):.4f} {elapsed_s:.0f} s", flush=True)
        if elapsed_s > next_snapshot_s:
            next_snapshot_s += 60 * options.snapshot_minutes
            save_average(options, average)
            export_snapshot(options)
    save_average(options, average)
    export_snapshot(options)
    print(f"{step} steps of {options.batch} in {elapsed_s / 60:.1f} minutes, loss {np.mean(losses[-500:]):.4f}")


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], networks: torch.nn.Module, step: int) -> None:
    """Exponential moving average with decay 0.998, faster in the beginning."""
    weight = 1 - min(0.998, (1 + step) / (10 + step))
    for name, tensor in networks.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, weight)


def save_average(options: Options, average: dict[str, torch.Tensor]) -> None:
    torch.save(average, options.work / "unet.tmp")
    (options.work / "unet.tmp").replace(options.work / "unet.pt")


def export_snapshot(options: Options) -> None:
    if options.snapshots:
        write_checkpoint(options, options.snapshots)
