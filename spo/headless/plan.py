"""What a run will do and what it will need, before it does anything: `spo train --dry-run`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spo.algorithm.diffusion import scaled_linear_alphas_cumprod
from spo.algorithm.rollout import pool_starts
from spo.config import Config
from spo.errors import SpoError
from spo.headless.device import choose_device, choose_dtype
from spo.headless.load import empty_unet
from spo.lora.adapter import modules_of_kinds
from spo.preference.load import describe_preference
from spo.training.host import ladder_of, rollout_settings
from spo.training.schedule import batches_per_epoch

if TYPE_CHECKING:
    from spo.checkpoint.info import CheckpointInfo

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Counts are for one prompt where the name says so, bytes are estimates but for the weights'.

    network_evaluations  of one latent with both halves of guidance, in sampling; decodes: pictures decoded and scored
    pairs_at_most        pairs of a prompt if every verdict is kept
    """

    architecture: str
    prediction_type: str
    device: str
    dtype: str
    width_px: int
    height_px: int
    modules: int
    parameters: int
    prompts: int
    batches: int
    steps: int
    network_evaluations: int
    decodes: int
    pairs_at_most: int
    training_evaluations: int
    weight_bytes: int
    adapter_bytes: int
    activation_bytes: int
    output: str

    def text(self) -> str:
        """A few lines for people."""
        total = self.weight_bytes + self.adapter_bytes + self.activation_bytes
        length = f"{self.steps} updates" if self.steps else f"{self.batches} rollouts over {self.prompts} prompts"
        return "\n".join(
            [
                f"checkpoint  {self.architecture}, {self.prediction_type}, {self.dtype} on {self.device}, "
                f"{self.width_px} x {self.height_px} px",
                f"trains      {self.modules} modules, {self.parameters:,} parameters",
                f"length      {length}",
                f"per prompt  {self.network_evaluations} network evaluations and {self.decodes} pictures scored "
                f"for at most {self.pairs_at_most} pairs; {self.training_evaluations} evaluations to train on those",
                f"memory      about {total / GIB:.1f} GiB: weights {self.weight_bytes / GIB:.1f}, LoRA with optimizer "
                f"{self.adapter_bytes / GIB:.2f}, activations {self.activation_bytes / GIB:.1f}",
                f"writes      {self.output}",
            ]
        )


def make_plan(config: Config, checkpoint: CheckpointInfo, prompts: Sequence[str]) -> Plan:
    """Count what a run will do. Loads no weights: the network is built without them, to count and to weigh."""
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.precision, device)
    unet = empty_unet(checkpoint)
    named: dict[str, Any] = dict(unet.named_modules())
    modules = [named[name] for name in modules_of_kinds(unet, config.lora.modules)]
    rank = config.lora.rank
    parameters = sum(rank * (_inputs(module) + module.weight.shape[0]) for module in modules)

    settings, steps = config.rollout, config.rollout.sampling_steps
    sigmas = ladder_of(config, scaled_linear_alphas_cumprod())
    windows = pool_starts(sigmas, scaled_linear_alphas_cumprod(), rollout_settings(config))
    steps = len(sigmas) - 1
    noisy = _sees(config.preference.preference) == "noisy latents"
    waits = 0 if noisy else 1  # for a verdict on noisy latents no candidate of the window's last step is evaluated
    in_pools = sum(min(end + waits, steps - 1) - start for start, end in windows)  # calls that see a whole pool
    guidance = 2 if settings.guidance_scale != 1 else 1
    evaluations = guidance * (steps - in_pools + settings.candidates * in_pools)
    transitions = sum(end - start + 1 for start, end in windows)
    shared = len(windows)  # of each window the first transition starts from one latent for both sides
    training_guidance = guidance if config.loss.train_guidance else 1
    updates = 2 * training_guidance * (shared + 2 * (transitions - shared))
    per_call = min(
        config.optimizer.pairs_per_call or config.optimizer.pairs_per_update, config.optimizer.pairs_per_update
    )
    latents = per_call * training_guidance * (2 if settings.inner_steps else 1)
    return Plan(
        architecture=checkpoint.architecture,
        prediction_type=checkpoint.prediction_type
        if config.model.prediction_type == "auto"
        else config.model.prediction_type,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        width_px=config.prompt.width,
        height_px=config.prompt.height,
        modules=len(modules),
        parameters=parameters,
        prompts=len(prompts),
        batches=config.optimizer.epochs * batches_per_epoch(len(prompts), config),
        steps=config.optimizer.steps,
        network_evaluations=evaluations,
        decodes=settings.candidates * len(windows),
        pairs_at_most=transitions,
        training_evaluations=updates,
        weight_bytes=checkpoint.parameters * dtype.itemsize,
        adapter_bytes=parameters * 4 * 4,  # weight, gradient and two moments in float32
        activation_bytes=latents * saved_activation_bytes(unet, config, dtype),
        output=config.run.output,
    )


def _sees(preference: str) -> str:
    """What a preference model looks at (see `Kind`); "" for a model that `load` will refuse, later and with reason."""
    try:
        return describe_preference(preference).sees
    except SpoError:
        return ""


def saved_activation_bytes(unet: Any, config: Config, dtype: torch.dtype) -> int:
    """What one latent's forward pass keeps for the backward pass: the tensors autograd saves, counted without memory.

    With gradient checkpointing only the largest block's are kept at a time, taken here as a quarter, beside its inputs.
    Attention is counted as a memory-saving kernel does it, without the matrix of weights.
    """
    from torch.autograd.graph import saved_tensors_hooks

    sizes: dict[int, int] = {}

    def weigh(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage()._cdata] = tensor.numel()
        return tensor

    settings = unet.config
    with torch.device("meta"):
        x = torch.zeros(1, 4, config.prompt.height // 8, config.prompt.width // 8, requires_grad=True)
        text = torch.zeros(1, 77, settings.cross_attention_dim)
        added = None
        if settings.addition_embed_type:
            pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
            added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        with saved_tensors_hooks(weigh, lambda tensor: tensor):
            unet(x, torch.zeros(1), text, added_cond_kwargs=added)
    total = sum(sizes.values()) * dtype.itemsize
    return math.ceil(total / 4) if config.model.gradient_checkpointing else total


def _inputs(module: Any) -> int:
    """Inputs of a Linear, or inputs times kernel of a Conv2d: elements in a row of its `down`."""
    return math.prod(module.weight.shape[1:])
