"""Give a demo checkpoint another autoencoder for the latents that it has.

    python -m recipes.demo_checkpoint.new_autoencoder --flat <emoji-datasource-google>
        --fluent <@lobehub/fluent-emoji-3d> --work <scratch> --out <result>

What was trained on those latents stays as it is: UNet, preference model, LoRAs. The new autoencoder begins with the old
one's weights as far as they fit, and is wider where they do not. Its decoder learns to turn the old encoder's latents,
noisy as a UNet's are, into the pictures; its encoder learns the old one's latents. Half of the examples and more show
core subjects, which is what the UNet draws.

Both make fixed numbers of steps from a seed and go on where they were cut off (`steps`). Written to --out:
demo.safetensors, demo.yaml and reconstructions.png (pictures, the old autoencoder's versions, the new one's).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from recipes.demo_checkpoint.autoencoder import colour_loss, gradient_loss
from recipes.demo_checkpoint.checkpoint import config_yaml, ldm_vae
from recipes.demo_checkpoint.networks import SCALE_FACTOR, SHIPPED_VAE, build_vae, parameter_count
from recipes.demo_checkpoint.pictures import (
    CHOICE,
    SIZE_PX,
    STYLES,
    Jitter,
    list_subjects,
    render,
    save_grid,
    to_pixels,
)
from recipes.demo_checkpoint.steps import AverageOf, learning_rate, precision_of, run_steps, updated
from recipes.demo_checkpoint.taken import VAE_PREFIX, read_vae
from spo.checkpoint.tensor_file import open_tensor_file, read_tensors
from spo.demo.judge import HERE
from spo.files import write_text, write_whole

JITTER = Jitter(saturations=(0.3, 1.6))  # further than the demo's UNet learns, for LoRAs that make colours vivid
RENDERINGS = 8
CORE_SHARE = 0.6  # of a batch, the rest is of all subjects
NOISE = 0.15  # at most, of the latents as the UNet sees them; how much differs between examples
AVERAGE = 0.995


@dataclass(frozen=True)
class Examples:
    """pixels: uint8 [subjects, 2, RENDERINGS, 3, 64, 64]; moments: the old encoder's, float16 [.., 8, 8, 8]; core: rows
    of core subjects."""

    pixels: torch.Tensor
    moments: torch.Tensor
    core: torch.Tensor

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [count, 3, 64, 64] in [-1, 1] and moments [count, 8, 8, 8], as torch's generator draws them."""
        core = self.core[torch.randint(len(self.core), (count,))]
        rows = torch.where(torch.rand(count) < CORE_SHARE, core, torch.randint(len(self.pixels), (count,)))
        styles, renderings = torch.randint(len(STYLES), (count,)), torch.randint(RENDERINGS, (count,))
        return to_pixels(self.pixels[rows, styles, renderings]), self.moments[rows, styles, renderings].float()


def grown(old: Any) -> Any:
    """An autoencoder of `SHIPPED_VAE` with another one's weights; what the other one lacks is as untrained.

    Where it is twice as wide each channel is there twice, side by side and so in one group of the norms, almost alike,
    and counts half.
    """
    vae = build_vae(SHIPPED_VAE)
    theirs, weights = old.state_dict(), vae.state_dict()
    for name, weight in weights.items():
        tensor = theirs.get(name)
        for dim in range(weight.ndim if tensor is not None else 0):
            if tensor.shape[dim] != weight.shape[dim]:
                tensor = tensor.repeat_interleave(2, dim) / (2 if dim else 1)
                tensor = tensor * (1 + 0.05 * torch.randn_like(tensor))
        if tensor is not None:
            weights[name] = tensor
    vae.load_state_dict(weights)
    return vae


@torch.no_grad()
def make_examples(flat: Path, fluent: Path, vae: Any, path: Path) -> Examples:
    """Renderings of all subjects and what the encoder makes of them; read from `path` where they are there."""
    if not path.exists():
        subjects, rng = list_subjects(flat, fluent), np.random.default_rng(0)
        pixels = np.empty((len(subjects), len(STYLES), RENDERINGS, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
        for row, subject in enumerate(subjects):
            for column, style in enumerate(STYLES):
                picture = Image.open(subject[style]).convert("RGBA")
                for number in range(RENDERINGS):
                    pixels[row, column, number] = render(picture, number, rng, JITTER)
        ordered = torch.from_numpy(pixels).permute(0, 1, 2, 5, 3, 4).contiguous()
        parts = (vae.encode(to_pixels(part)).latent_dist.parameters.half() for part in ordered.flatten(0, 2).split(64))
        moments = torch.cat(list(parts)).unflatten(0, ordered.shape[:3])
        core = [row for row, subject in enumerate(subjects) if subject["name"] in CHOICE["core_subjects"]]
        made = {"pixels": ordered, "moments": moments, "core": torch.tensor(core)}
        write_whole(path, lambda temporary: torch.save(made, temporary))
    return Examples(**torch.load(path, weights_only=True))


def decoder_batch(examples: Examples, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [count, 3, 64, 64] and the old means [count, 4, 8, 8] with noise, as a decoder learns them."""
    pixels, moments = examples.batch(count)
    noise = NOISE / SCALE_FACTOR * torch.rand(count, 1, 1, 1) * torch.randn(count, 4, SIZE_PX // 8, SIZE_PX // 8)
    latents = (moments[:, :4] + noise).to(device)
    return pixels.to(device), latents.contiguous(memory_format=torch.channels_last)


def picture_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 at three scales, of differences between neighbours, and of colours."""
    total = (decoded - pixels).abs().mean() + 0.7 * gradient_loss(decoded, pixels) + colour_loss(decoded, pixels)
    for factor in (2, 4):
        total = total + 0.5 * (F.avg_pool2d(decoded, factor) - F.avg_pool2d(pixels, factor)).abs().mean()
    return total


def train_decoder(vae: Any, examples: Examples, steps: int, batch: int, work: Path, save_every: int) -> None:
    """The decoder and post_quant_conv of `vae`, in place: to pictures, from the old means and noise."""
    device = next(vae.parameters()).device
    part = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def loss() -> tuple[torch.Tensor, dict[str, float]]:
        pixels, latents = decoder_batch(examples, batch, device)
        with precision_of(device):
            decoded = vae.decode(latents).sample
        decoded = decoded.float()
        return picture_loss(decoded, pixels), {"L1": (decoded.detach() - pixels).abs().mean().item()}

    _train("decoder", part, loss, steps, work, save_every)


def train_encoder(vae: Any, examples: Examples, steps: int, batch: int, work: Path, save_every: int) -> None:
    """The encoder and quant_conv of `vae`, in place: to the old means and log-variances."""
    device = next(vae.parameters()).device
    part = torch.nn.ModuleList([vae.encoder, vae.quant_conv])

    def loss() -> tuple[torch.Tensor, dict[str, float]]:
        pixels, moments = (values.to(device) for values in examples.batch(batch))
        with precision_of(device):
            made = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.parameters
        apart = made.float() - moments
        means = SCALE_FACTOR * apart[:, :4]
        total = means.square().mean() + means.abs().mean() + 0.02 * apart[:, 4:].square().mean()
        return total, {"means apart by": means.detach().square().mean().sqrt().item()}

    _train("encoder", part, loss, steps, work, save_every)


def _train(
    stage: str,
    part: torch.nn.Module,
    loss: Callable[[], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    work: Path,
    save_every: int,
) -> None:
    optimizer = torch.optim.AdamW(part.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    average = AverageOf(part, AVERAGE)

    def step(number: int) -> dict[str, float]:
        with updated(optimizer, part, learning_rate(number / steps, 2e-3)) as backward:
            total, numbers = loss()
            backward(total)
        average.update(number + 1)
        return {"loss": total.item(), **numbers}

    print(f"{stage}: {parameter_count(part) / 1e6:.2f} M parameters", flush=True)
    run_steps(
        stage, steps, {"part": part, "optimizer": optimizer, "average": average}, step, work=work, save_every=save_every
    )
    part.load_state_dict(average.state_dict())


def write_checkpoint(source: Path, vae: Any, out: Path) -> None:
    """demo.safetensors, as `source` but for the autoencoder, and demo.yaml."""
    file = open_tensor_file(source)
    tensors = read_tensors(file, [name for name in file.tensors if not name.startswith(VAE_PREFIX)])
    tensors |= {f"{VAE_PREFIX}{name}": tensor.half().contiguous() for name, tensor in ldm_vae(vae).items()}
    write_whole(out / "demo.safetensors", lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    write_text(out / "demo.yaml", config_yaml(SHIPPED_VAE))


@torch.no_grad()
def draw(old: Any, new: Any, examples: Examples, path: Path) -> None:
    """reconstructions.png; prints how far both versions are from the pictures, from the old encoder and the own one."""
    rows = examples.core[:: max(1, len(examples.core) // 16)][:16]
    pixels, moments = to_pixels(examples.pixels[rows, :, 3].flatten(0, 1)), examples.moments[rows, :, 3].flatten(0, 1)
    means = moments[:, :4].float()
    versions = [pixels, old.decode(means).sample, new.decode(means).sample]
    own = new.decode(new.encode(pixels).latent_dist.mean).sample
    for name, version in zip(("old", "new", "new, own encoder"), [*versions[1:], own], strict=True):
        print(f"{name}: L1 {(version - pixels).abs().mean():.4f}")
    save_grid(
        path, torch.cat([part for parts in zip(*(v.split(16) for v in versions), strict=True) for part in parts]), 16
    )


def parser_of(description: str | None, scratch: str) -> argparse.ArgumentParser:
    """What both recipes of an autoencoder are asked. scratch: how their folders' names begin."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flat", type=Path, required=True, help="unpacked npm package emoji-datasource-google")
    parser.add_argument("--fluent", type=Path, required=True, help="unpacked npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "demo.safetensors", help="default: the demo's")
    parser.add_argument("--work", type=Path, default=Path(f"{scratch}-work"), help="scratch folder")
    parser.add_argument("--out", type=Path, default=Path(f"{scratch}-out"), help="folder for the results")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def begin(given: argparse.Namespace) -> tuple[Any, Examples]:
    """The checkpoint's autoencoder as it is, and the examples; the folders are there afterwards."""
    torch.set_num_threads(given.threads)
    for folder in (given.work, given.out):
        folder.mkdir(parents=True, exist_ok=True)
    old = read_vae(given.checkpoint)
    return old, make_examples(given.flat, given.fluent, old, given.work / "examples.pt")


def finish(given: argparse.Namespace, old: Any, new: Any, examples: Examples) -> None:
    """Write the checkpoint with the new autoencoder, and draw both."""
    new = new.to("cpu").eval()
    write_checkpoint(given.checkpoint, new, given.out)
    draw(old, new, examples, given.out / "reconstructions.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "autoencoder")
    parser.add_argument("--decoder-steps", type=int, default=1500)
    parser.add_argument("--decoder-batch", type=int, default=12)
    parser.add_argument("--encoder-steps", type=int, default=500)
    parser.add_argument("--encoder-batch", type=int, default=16)
    given = parser.parse_args(arguments)
    old, examples = begin(given)
    torch.manual_seed(0)
    new = grown(old).to(given.device, memory_format=torch.channels_last)
    train_decoder(new, examples, given.decoder_steps, given.decoder_batch, given.work, given.save_every)
    train_encoder(new, examples, given.encoder_steps, given.encoder_batch, given.work, given.save_every)
    finish(given, old, new, examples)


if __name__ == "__main__":
    main()
