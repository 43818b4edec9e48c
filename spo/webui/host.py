"""The WebUI's loaded checkpoint as a `trainer.Host`. It is borrowed, never changed.

Pictures are sampled through the WebUI's own processing, so that prompt weights, prompt editing, styles, clip skip, the
user's VAE, schedule types and LoRAs named in prompts work as in txt2img. Training runs the same network with gradients,
with the conditioning that the prompt had at the step a pair comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo.compare import to_picture
from spo.config import Config
from spo.errors import SpoError
from spo.preference.protocol import PreferenceModel
from spo.rng import SeededDraws
from spo.rollout import PoolVerdict, Rollout, RolloutSettings
from spo.trainer import StopRequested, ladder_of
from spo.webui import sampler

if TYPE_CHECKING:
    from PIL.Image import Image


def architecture_of(model: Any) -> str:
    """Which of "sd15" and "sdxl" the loaded model is. Raises SpoError for what cannot be trained; touches nothing."""
    from modules import lowvram, shared

    name = getattr(getattr(model, "sd_checkpoint_info", None), "title", "the loaded checkpoint")
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if getattr(model, "is_sd3", False) or network is None:
        raise SpoError(f"{name} is not SD1.5 or SDXL, so it cannot be trained here; load another checkpoint.")
    if getattr(model, "is_sd2", False):
        raise SpoError(f"{name} is a Stable Diffusion 2 checkpoint; load an SD1.5 or SDXL one.")
    inputs = next(network.input_blocks[0].parameters()).shape[1]
    if inputs != 4:
        raise SpoError(f"{name} takes {inputs} channels (inpainting or editing); load a text-to-image checkpoint.")
    if _is_refiner(model):
        raise SpoError(f"{name} is an SDXL refiner; load the base checkpoint.")
    if lowvram.is_enabled(model) or shared.cmd_opts.lowvram:
        raise SpoError("The WebUI runs with --lowvram or --medvram, which moves the network about; start it without.")
    return "sdxl" if getattr(model, "is_sdxl", False) else "sd15"


def _is_refiner(model: Any) -> bool:
    return getattr(model, "is_sdxl", False) and not any(
        type(embedder).__name__.startswith("FrozenCLIP") for embedder in model.conditioner.embedders
    )


@dataclass(frozen=True)
class _Told:
    """Conditioning of one latent: cond [k, L, D] (a dict for SDXL) with the weights of AND, and uncond [1, L', D]."""

    cond: Any
    weights: tuple[tuple[int, float], ...]
    uncond: Any

    def lengths(self) -> list[int]:
        """Numbers of text tokens, of cond and uncond."""
        sides = (self.cond, self.uncond)
        return [(side["crossattn"] if isinstance(side, dict) else side).shape[1] for side in sides]


@dataclass(frozen=True)
class _InitialNoise:
    """Stands in for the WebUI's image generator: the project's own initial noise, [B, *shape]."""

    draws: SeededDraws
    shape: tuple[int, ...]

    def next(self) -> Tensor:
        from modules import shared

        return self.draws.initial(self.shape).to(shared.device)


def _denoise_group(inner: Any, x: Tensor, sigma: Tensor, told: Sequence[_Told], guidance: float) -> Tensor:
    """[N, ...] denoised by one call (two where the lengths of positive and negative prompts differ)."""
    from modules.sd_samplers_cfg_denoiser import catenate_conds

    counts = [len(one.weights) for one in told]
    rows = torch.repeat_interleave(torch.arange(len(told)), torch.tensor(counts)).tolist()

    def evaluate(index: list[int], conds: list[Any]) -> Tensor:
        cond = catenate_conds(conds)
        image = x.new_zeros(len(index), 5, 1, 1)  # the WebUI's stand-in for models without image conditioning
        text = cond if isinstance(cond, dict) else {"c_crossattn": [cond]}
        return inner(x[index], sigma[index], cond={**text, "c_concat": [image]})

    everyone = list(range(len(told)))
    positive = [one.cond for one in told]
    if guidance == 1:
        outputs, base = evaluate(rows, positive), None
    elif len({length for one in told for length in one.lengths()}) == 1:
        both = evaluate(rows + everyone, positive + [one.uncond for one in told])
        outputs, base = both[: len(rows)], both[len(rows) :]
    else:
        outputs, base = evaluate(rows, positive), evaluate(everyone, [one.uncond for one in told])
    denoised = []
    for n, (one, mine) in enumerate(zip(told, outputs.split(counts), strict=True)):
        if base is None:
            total = sum(weight for _, weight in one.weights)
            denoised.append(sum(mine[i] * weight for i, weight in one.weights) / total)
        else:
            denoised.append(base[n] + sum((mine[i] - base[n]) * (weight * guidance) for i, weight in one.weights))
    return torch.stack(denoised)


class WebUIHost:
    """A `trainer.Host` over `shared.sd_model`. See there for the methods."""

    naming = "ldm"

    def __init__(self, config: Config) -> None:
        from modules import shared

        self.model = shared.sd_model
        self.config = config
        self.architecture = architecture_of(self.model)
        self.prediction_type = "v_prediction" if self.model.parameterization == "v" else "epsilon"
        self.network = self.model.model.diffusion_model
        self.device = shared.device
        info = self.model.sd_checkpoint_info
        self.checkpoint_name, self.checkpoint_hash = info.name_for_extra, info.shorthash or ""
        self._conditions: dict[str, Any] = {}

    # ---- prompts

    def prepare(self, prompts: Sequence[str]) -> None:
        """Nothing to do: the WebUI encodes when it samples, and `denoise` keeps what it needs."""
        self._conditions.clear()

    def _schedules(self, prompt: str) -> tuple[Any, Any]:
        """(positive, negative) of one prompt with all its steps, as the WebUI's processing makes them."""
        from modules import extra_networks, prompt_parser

        if prompt not in self._conditions:
            steps = len(self.ladder()) - 1
            text, _ = extra_networks.parse_prompt(prompt)
            size = (self.config.prompt.width, self.config.prompt.height)

            def told(texts: list[str], negative: bool) -> Any:
                return prompt_parser.SdConditioning(texts, width=size[0], height=size[1], is_negative_prompt=negative)

            with torch.no_grad(), self._autocast():
                positive = prompt_parser.get_multicond_learned_conditioning(self.model, told([text], False), steps)
                negative = prompt_parser.get_learned_conditioning(
                    self.model, told([self.config.prompt.negative_prompt], True), steps
                )
            self._conditions[prompt] = (positive, negative)
        return self._conditions[prompt]

    def ladder(self) -> Tensor:
        """[T + 1] noise levels: the configured ones, on the loaded model's own schedule."""
        return ladder_of(self.config, self.model.alphas_cumprod.float().cpu())

    # ---- sampling

    def rollout(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RolloutSettings,
        preference: PreferenceModel | None,
        watch: Callable[[PoolVerdict], None] | None,
    ) -> Rollout:
        """Through the WebUI's processing and its CFG denoiser; see `trainer.Host`."""
        task = sampler.RolloutTask(settings, preference, list(prompts), SeededDraws(seeds), self.decode, watch)
        with sampler.task_for_sampler(task):
            self._process(prompts, seeds)
        if task.rollout is None:
            raise StopRequested
        return task.rollout

    def _process(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Run the WebUI's txt2img for these prompts, up to the latents: nothing is decoded, nothing is saved."""
        from modules import processing

        class UpToLatents(processing.StableDiffusionProcessingTxt2Img):
            def sample(self, *args: Any, **kwargs: Any) -> Any:
                self.rng = _InitialNoise(draws, (4, self.height // 8, self.width // 8))
                super().sample(*args, **kwargs)
                done = processing.DecodedSamples()
                done.extend([torch.zeros(3, 8, 8)] * len(self.prompts))
                return done

        draws, prompt = SeededDraws(seeds), self.config.prompt
        p = UpToLatents(
            sd_model=self.model,
            prompt=list(prompts),
            negative_prompt=[prompt.negative_prompt] * len(prompts),
            seed=[seed % 2**32 for seed in seeds],
            subseed=[0] * len(prompts),
            batch_size=len(prompts),
            steps=len(self.ladder()) - 1,
            cfg_scale=self.config.rollout.guidance_scale,
            width=prompt.width,
            height=prompt.height,
            sampler_name=sampler.NAME,
            do_not_save_samples=True,
            do_not_save_grid=True,
        )
        p.sampler_noise_scheduler_override = lambda steps: self.ladder()
        try:
            processing.process_images(p)
        finally:
            p.close()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[N, 4, h, w] latents -> [N, 3, 8 h, 8 w] pictures in [-1, 1], float32, by the user's VAE and method."""
        from modules import sd_samplers_common

        parts = latents.split(self.config.rollout.decode_batch)
        pixels = [sd_samplers_common.decode_first_stage(self.model, part).float() for part in parts]
        return torch.cat(pixels).clamp(-1, 1)

    # ---- training

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[str], step: Tensor) -> Tensor:
        """Denoised latents with gradient, each with the conditioning its prompt had at its step; see `trainer.Host`."""
        guidance = self.config.rollout.guidance_scale if self.config.loss.train_guidance else 1.0
        told = [self._told(prompt, at) for prompt, at in zip(prompts, step.tolist(), strict=True)]
        inner = self._inner_model()
        if len({length for one in told for length in one.lengths()}) == 1:
            groups = [list(range(len(told)))]
        else:  # prompts of different lengths cannot share a call
            groups = [[n] for n in range(len(told))]
        parts = [_denoise_group(inner, x[rows], sigma[rows], [told[n] for n in rows], guidance) for rows in groups]
        return torch.cat(parts).float()

    def _told(self, prompt: str, step: int) -> _Told:
        from modules import prompt_parser

        positive, negative = self._schedules(prompt)
        weights, cond = prompt_parser.reconstruct_multicond_batch(positive, step)
        return _Told(cond, tuple(weights[0]), prompt_parser.reconstruct_cond_batch(negative, step))

    def _inner_model(self) -> Any:
        import k_diffusion.external
        from modules import shared

        constructor = getattr(self.model, "create_denoiser", None)
        if constructor is not None:
            return constructor()
        kind = (
            k_diffusion.external.CompVisVDenoiser
            if self.prediction_type == "v_prediction"
            else (k_diffusion.external.CompVisDenoiser)
        )
        return kind(self.model, quantize=shared.opts.enable_quantization)

    def _autocast(self) -> AbstractContextManager[Any]:
        from modules import devices

        return devices.without_autocast() if devices.unet_needs_upcast else devices.autocast()

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Ordinary samples with the network as it is now."""
        plain = RolloutSettings(candidates=1, eta=self.config.rollout.eta)
        return [to_picture(pixels) for pixels in self.decode(self.rollout(prompts, seeds, plain, None, None).x).cpu()]
