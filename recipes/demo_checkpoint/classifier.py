"""Stages "classifier" and "calibrate": which subject a picture shows, whatever the strength of its colours, and how
surely."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from recipes.demo_checkpoint.networks import SCALE_FACTOR, load_vae, parameter_count
from recipes.demo_checkpoint.options import Options
from recipes.demo_checkpoint.pictures import (
    SIZE_PX,
    STYLES,
    VARIANTS,
    core_rows,
    load_pictures,
    load_subjects,
    saturate,
    to_pixels,
)
from recipes.demo_checkpoint.sampling import Sampler
from recipes.demo_checkpoint.steps import learning_rate, run_steps, updated
from spo.demo.subjects import SubjectClassifier, load
from spo.files import write_whole
from spo.preference.subject_score import SubjectNetwork

CALIBRATION_SEEDS = (3, 4)  # prompts are chosen with others, and judged with others still


@torch.no_grad()
def classifier_pictures(work: Path, rows: list[int]) -> torch.Tensor:
    """uint8 [subjects, 2, VARIANTS + 1, 3, 64, 64]: the renderings, and the autoencoder's version of one of them."""
    pictures, vae = load_pictures(work)[rows], load_vae(work)
    latents = torch.load(work / "latents.pt")[rows, :, 1].flatten(0, 1).float()
    decoded = torch.cat([vae.decode(part / SCALE_FACTOR).sample for part in latents.split(128)])
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().view(len(rows), len(STYLES), 1, 3, SIZE_PX, SIZE_PX)
    return torch.cat([pictures, decoded], 2)


def jitter(pixels: torch.Tensor) -> torch.Tensor:
    """Strong changes of saturation, brightness, contrast; slight ones of hue, place, size, sharpness, and noise."""
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(count, *shape).uniform_(low, high)

    mix = torch.eye(3) + uniform(-0.06, 0.06, 3, 3)
    pixels = torch.einsum("nij,njhw->nihw", mix / mix.sum(2, keepdim=True), pixels)
    pixels = saturate(pixels, uniform(0.15, 2.2))
    pixels = pixels * uniform(0.7, 1.2, 1, 1, 1) + uniform(-0.15, 0.15, 1, 1, 1)
    zoom, zero = uniform(0.9, 1.12), torch.zeros(count)
    affine = torch.stack([zoom, zero, uniform(-0.1, 0.1), zero, zoom, uniform(-0.1, 0.1)], 1).view(count, 2, 3)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    pixels = pixels.lerp(F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1), uniform(0, 1, 1, 1, 1))
    return (pixels + 0.1 * torch.rand(count, 1, 1, 1) * torch.randn_like(pixels)).clamp(-1, 1)


def train_classifier(options: Options) -> None:
    """--classifier-steps batches of 128 jittered pictures over the core subjects."""
    device = options.place
    torch.manual_seed(0)
    subjects = load_subjects(options.work)
    rows = core_rows(subjects)
    pictures = classifier_pictures(options.work, rows)
    network = SubjectNetwork(len(rows)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.05)
    print(f"classifier: {parameter_count(network) / 1e6:.2f} M parameters, {len(rows)} classes", flush=True)

    def step(number: int) -> dict[str, float]:
        labels, styles = torch.randint(len(rows), (128,)), torch.randint(2, (128,))
        variants = torch.where(torch.rand(128) < 0.4, VARIANTS, torch.randint(VARIANTS, (128,)))
        pixels = jitter(to_pixels(pictures[labels, styles, variants])).to(device)
        labels = labels.to(device)
        with updated(optimizer, network, learning_rate(number / options.classifier_steps, 4e-3)) as backward:
            logits = network(pixels)
            loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
            backward(loss)
        return {"loss": loss.item(), "right": (logits.argmax(1) == labels).float().mean().item()}

    objects = {"network": network, "optimizer": optimizer}
    run_steps("classifier", options.classifier_steps, objects, step, work=options.work, save_every=options.save_every)
    network.cpu()
    save_classifier(SubjectClassifier(network, [subjects[row]["name"] for row in rows]), options)
    measure_classifier(options, pictures)


def save_classifier(classifier: SubjectClassifier, options: Options) -> None:
    """subject_classifier.safetensors, in float16; BatchNorm's batch counters, which judging does not need, stay out."""
    weights = classifier.network.state_dict()
    tensors = {name: weight.half() for name, weight in weights.items() if weight.is_floating_point()}
    facts = {"format": "pt", "classes": json.dumps(classifier.classes)}
    path = options.out / "subject_classifier.safetensors"
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=facts))


def temperature(logits: Tensor, labels: Tensor) -> float:
    """What to divide logits [N, classes] by for the least cross-entropy with labels [N]: temperature scaling (Guo et
    al. 2017, section 4.2)."""
    log = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = F.cross_entropy(logits / log.exp(), labels)
        entropy.backward()
        return entropy

    optimizer.step(loss)
    return log.exp().item()


def calibrate_classifier(options: Options) -> None:
    """Divide the logits by the temperature of the checkpoint's own pictures of all subjects, CALIBRATION_SEEDS each.

    Labels were smoothed and pictures were jittered, so a classifier that is right doubts more than it need; adherence
    is its probability, and would count a paler picture of a subject as half of a lost one. No assignment changes.
    """
    classifier = load(options.out / "subject_classifier.safetensors")
    labels = torch.arange(len(classifier.classes)).repeat_interleave(len(CALIBRATION_SEEDS))
    pixels = Sampler(options).of_each(classifier.classes, CALIBRATION_SEEDS)
    with torch.no_grad():
        logits = classifier.network(pixels.flatten(0, 1))
    divisor = temperature(logits, labels)
    right = (logits.argmax(1) == labels).float().mean()
    sure = [(logits / by).softmax(1).amax(1).mean() for by in (1, divisor)]
    print(f"temperature {divisor:.3f}: {sure[0]:.3f} sure before, {sure[1]:.3f} after, {right:.3f} right")
    with torch.no_grad():
        for weight in classifier.network.classify.parameters():
            weight.div_(divisor)
    save_classifier(classifier, options)


def measure_classifier(options: Options, pictures: torch.Tensor) -> None:
    """Print how many decoded pictures are assigned to their subject at several saturations."""

    classifier = load(options.out / "subject_classifier.safetensors")
    decoded = to_pixels(pictures[:, :, VARIANTS].flatten(0, 1))
    labels = torch.arange(len(pictures)).repeat_interleave(len(STYLES))
    for factor in (0.25, 0.5, 1.0, 1.5, 2.0):
        right = (classifier.assign(saturate(decoded, torch.full((len(decoded),), factor))) == labels).float().mean()
        print(f"saturation x {factor}: {right:.3f} of {len(decoded)} decoded pictures assigned to their subject")
