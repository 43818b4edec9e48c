"""Prompts as the WebUI reads them: networks, weights, editing and AND."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spo.webui.a1111.checkpoint import Checkpoint
from spo.webui.a1111.network import autocast
from spo.webui.a1111.options import option

_CHUNK = 77  # places of a chunk of tokens


def prompt_text(prompt: str) -> str:
    """A prompt without the networks that it names."""
    from modules import extra_networks

    return str(extra_networks.parse_prompt(prompt)[0])


def networks_of(prompt: str) -> list[str]:
    """The networks that a prompt names, as it names them: "<lora:style:0.5>"; sorted by their kind."""
    from modules import extra_networks

    named = extra_networks.parse_prompt(prompt)[1]
    return [f"<{kind}:{':'.join(one.items)}>" for kind in sorted(named) for one in named[kind]]


def activate_networks(prompt: str) -> None:
    """Make the networks that a prompt names the active ones, and no others; weights follow when they are used."""
    from modules import extra_networks, processing

    p = processing.StableDiffusionProcessingTxt2Img(prompt=prompt)
    p.all_prompts = [prompt]
    with torch.no_grad(), autocast():
        extra_networks.activate(p, extra_networks.parse_prompts([prompt])[1])


@dataclass(frozen=True)
class StepConditioning:
    """What one latent is told at one step.

    cond     [k, L, D] (a dict of such for SDXL), one row for each part of a prompt with AND; weights: (row, weight)
    uncond   [1, L', D], likewise
    """

    cond: Any
    weights: tuple[tuple[int, float], ...]
    uncond: Any

    def lengths(self) -> list[int]:
        """Numbers of text tokens, of cond and uncond."""
        sides = (self.cond, self.uncond)
        return [(side["crossattn"] if isinstance(side, dict) else side).shape[1] for side in sides]


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts with what they are at every step, in the WebUI's own terms, in memory and not on the card.

    positive  prompt -> its parts (of AND), each with its schedule; negative: the schedule of the one negative prompt
    """

    positive: Mapping[str, Any]
    negative: Any

    def at(self, prompt: str, step: int, device: torch.device) -> StepConditioning:
        """What a prompt is at step number `step`, 0-based: prompt editing and AND count."""
        from modules import prompt_parser

        weights, cond = prompt_parser.reconstruct_multicond_batch(self._multicond([self.positive[prompt]]), step)
        uncond = prompt_parser.reconstruct_cond_batch([self.negative], step)
        return StepConditioning(_to(cond, device), tuple(weights[0]), _to(uncond, device))

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """[N, D] float32 on the CPU; see `text_features`."""
        return _means([self.positive[prompt] for prompt in prompts])

    def batch(self, prompts: Sequence[str], device: torch.device) -> tuple[Any, Any]:
        """(cond, uncond) of a batch for the CFG denoiser."""
        negative = _schedule_to(self.negative, device)
        parts = [_parts_to(self.positive[prompt], device) for prompt in prompts]
        return self._multicond(parts), [negative] * len(prompts)

    def _multicond(self, parts: list[Any]) -> Any:
        from modules import prompt_parser

        return prompt_parser.MulticondLearnedConditioning((len(parts),), parts)


def encode_prompts(
    checkpoint: Checkpoint, prompts: Iterable[str], negative_prompt: str, steps: int, width: int, height: int
) -> EncodedPrompts:
    """All prompts through the text encoders, for `steps` steps; the active networks count. width, height in pixels.

    One by one, as the WebUI itself does: its emphasis normalises over what is encoded together.
    """
    from modules import sd_hijack

    sd_hijack.model_hijack.embedding_db.load_textual_inversion_embeddings()
    return encode_by_model(checkpoint, prompts, negative_prompt, steps, width, height)


def encode_by_model(
    checkpoint: Checkpoint, prompts: Iterable[str], negative_prompt: str, steps: int, width: int, height: int
) -> EncodedPrompts:
    """`encode_prompts`, with the embeddings that the model has."""
    from modules import prompt_parser

    model, cpu, old = checkpoint.model, torch.device("cpu"), option("use_old_scheduling")
    scheduling = (steps, None) if old is None else (steps, None, old)  # neo has one way only

    def text(one: str, negative: bool) -> Any:
        return prompt_parser.SdConditioning([one], width=width, height=height, is_negative_prompt=negative)

    with torch.no_grad(), autocast():
        positive = {}
        for prompt in prompts:
            conditioning = prompt_parser.get_multicond_learned_conditioning(
                model, text(prompt_text(prompt), False), *scheduling
            )
            positive[prompt] = _parts_to(conditioning.batch[0], cpu)
        negative = prompt_parser.get_learned_conditioning(model, text(negative_prompt, True), *scheduling)
    return EncodedPrompts(positive, _schedule_to(negative[0], cpu))


def text_features(conditioning: Any) -> torch.Tensor:
    """[B, D] float32 on the CPU: what a pass's prompts are to the network, as `Host.text_features` has it.

    conditioning  the WebUI's `MulticondLearnedConditioning` of the B prompts. Of prompt editing the end counts, of
                  parts with AND the mean by their weights, those below 0 left out
    """
    return _means(conditioning.batch)


def _means(prompts: Sequence[Sequence[Any]]) -> torch.Tensor:
    """[N, D] of N prompts' parts with their schedules: the means over the first chunk of tokens."""
    means = []
    for parts in prompts:
        liked = [part for part in parts if part.weight > 0] or parts
        weights = torch.tensor([abs(float(part.weight)) for part in liked])
        means.append((weights / weights.sum()) @ torch.stack([_mean(part.schedules[-1].cond) for part in liked]))
    return torch.stack(means)


def _mean(conditioning: Any) -> torch.Tensor:
    tokens = conditioning["crossattn"] if isinstance(conditioning, dict) else conditioning
    return tokens[:_CHUNK].detach().float().mean(0).cpu()


def _parts_to(parts: list[Any], device: torch.device) -> list[Any]:
    from modules import prompt_parser

    return [
        prompt_parser.ComposableScheduledPromptConditioning(_schedule_to(part.schedules, device), part.weight)
        for part in parts
    ]


def _schedule_to(schedule: list[Any], device: torch.device) -> list[Any]:
    return [entry._replace(cond=_to(entry.cond, device)) for entry in schedule]


def _to(conditioning: Any, device: torch.device) -> Any:
    """A tensor, or SDXL's dict of tensors, on a device."""
    if isinstance(conditioning, dict):
        moved = {key: value.to(device) for key, value in conditioning.items()}
        return type(conditioning)(moved)
    return conditioning.to(device)
