"""Give a demo checkpoint a decoder with crisp edges, for the latents that it has.

    python -m recipes.demo_checkpoint.sharper_decoder --flat <emoji-datasource-google>
        --fluent <@lobehub/fluent-emoji-3d> --work <scratch> --out <result>

An L1 distance is content with a blurred edge where four numbers for 8 x 8 pixels leave its place open. As the
autoencoders of Stable Diffusion were trained, so this goes on from the decoder that is there with a second network that
tells its pictures from true ones, patch by patch (hinge loss), whose layers also measure how alike both are. Its share
of the gradient is held at a part of the other losses' (Esser et al. 2021, section 3.2). Encoder, UNet, preference model
and LoRAs stay as they are.

A fixed number of steps from a seed that goes on where it was cut off (`steps`). Written to --out: demo.safetensors,
demo.yaml and reconstructions.png (pictures, the old decoder's versions, the new one's).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.demo_checkpoint.networks import parameter_count
from recipes.demo_checkpoint.new_autoencoder import (
    AVERAGE,
    Examples,
    begin,
    decoder_batch,
    finish,
    parser_of,
    picture_loss,
)
from recipes.demo_checkpoint.steps import AverageOf, learning_rate, run_steps, updated

ADVERSARIAL = 0.5  # the gradient that the critic may give the last layer, as a part of the other losses'
ALIKE = 0.2  # weight of the distance between the critic's features
RATE, CRITIC_RATE = 3e-4, 5e-4
HEAD_START = 100  # steps of the critic alone


class Critic(nn.Module):
    """Whether patches of pictures [N, 3, 64, 64] are true: logits [N, 1, 16, 16], and each layer's features."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        strides = (2, 2, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 5 if stride == 2 else 3, stride, 2 if stride == 2 else 1),
                nn.GroupNorm(8, b) if a > 3 else nn.Identity(),
                nn.LeakyReLU(0.2),
            )
            for (a, b), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.last = nn.Conv2d(widths[-1], 1, 3, 1, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            pixels = layer(pixels)
            features.append(pixels)
        return self.last(pixels), features


def critic_loss(critic: Critic, true: Tensor, made: Tensor) -> Tensor:
    """Hinge loss of telling them apart: 2 where it cannot, 0 where it is sure."""
    return F.relu(1 - critic(true)[0]).mean() + F.relu(1 + critic(made)[0]).mean()


def balanced(losses: Tensor, adversarial: Tensor, weight: Tensor) -> Tensor:
    """Their sum, the second scaled so that its gradient at `weight` is `ADVERSARIAL` of the first's."""
    sizes = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (losses, adversarial)]
    factor = (ADVERSARIAL * sizes[0] / (sizes[1] + 1e-6)).clamp(max=100).detach()
    return losses + factor * adversarial


def train_decoder(vae: Any, examples: Examples, steps: int, batch: int, work: Path, save_every: int) -> None:
    """The decoder and post_quant_conv of `vae`, in place."""
    device = next(vae.parameters()).device
    torch.manual_seed(0)
    part, critic = nn.ModuleList([vae.post_quant_conv, vae.decoder]), Critic().to(device)
    part.requires_grad_(True)
    own = torch.optim.AdamW(part.parameters(), lr=0.0, betas=(0.5, 0.9), weight_decay=1e-3)
    critics = torch.optim.AdamW(critic.parameters(), lr=0.0, betas=(0.5, 0.9), weight_decay=1e-3)
    average = AverageOf(part, AVERAGE)
    print(f"decoder: {parameter_count(part) / 1e6:.2f} M, critic: {parameter_count(critic) / 1e6:.2f} M", flush=True)

    def step(number: int) -> dict[str, float]:
        pixels, latents = decoder_batch(examples, batch, device)
        with torch.set_grad_enabled(number >= HEAD_START):  # before that the critic alone, which knows nothing yet
            made = vae.decode(latents).sample.float()
        numbers = {}
        if number >= HEAD_START:
            rate = learning_rate((number - HEAD_START) / (steps - HEAD_START), RATE)
            with updated(own, part, rate) as backward:
                verdict, features = critic(made)
                with torch.no_grad():
                    true_features = critic(pixels)[1]
                alike = torch.stack([(a - b).abs().mean() for a, b in zip(features, true_features, strict=True)]).sum()
                losses = picture_loss(made, pixels) + ALIKE * alike
                backward(balanced(losses, -verdict.mean(), vae.decoder.conv_out.weight))
            numbers["alike"] = alike.item()
        with updated(critics, critic, CRITIC_RATE) as backward:
            told = critic_loss(critic, pixels, made.detach())
            backward(told)
        average.update(number + 1)
        distance = (made.detach() - pixels).abs().mean()
        return {"L1": distance.item(), "critic": told.item(), **numbers}

    objects = {"part": part, "critic": critic, "own": own, "critics": critics, "average": average}
    run_steps("sharper", steps, objects, step, work=work, save_every=save_every)
    part.load_state_dict(average.state_dict())
    part.requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "decoder")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=12)
    given = parser.parse_args(arguments)
    old, examples = begin(given)
    new = copy.deepcopy(old).to(given.device, memory_format=torch.channels_last)
    train_decoder(new, examples, given.steps, given.batch, given.work, given.save_every)
    finish(given, old, new, examples)


if __name__ == "__main__":
    main()
