"""Training and sampling without a WebUI: the host around a checkpoint that diffusers loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo.algorithm.denoiser import Conditioning, GuidedDenoiser
from spo.algorithm.preference import PreferenceModel
from spo.algorithm.rollout import PoolVerdict, Rollout, RolloutSettings, Scoring, sample_spo
from spo.checkpoint.hashes import short_hash
from spo.config import Config
from spo.headless.device import choose_device, choose_dtype
from spo.rng import SeededDraws
from spo.training.loop import ladder_of

if TYPE_CHECKING:
    from spo.headless.model import DiffusersModel


def repeat_conditioning(extra_args: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """The denoiser's arguments for `count` candidates of every image, candidate-major."""
    return {
        name: value.repeat(count) if isinstance(value, Conditioning) else value for name, value in extra_args.items()
    }


class HeadlessHost:
    """A `training.host.Host` over a `DiffusersModel`."""

    naming = "diffusers"

    def __init__(self, model: DiffusersModel, config: Config) -> None:
        self.model, self.config = model, config
        self.architecture: str = model.architecture
        self.prediction_type: str = model.prediction_type
        self.network: torch.nn.Module = model.unet
        self.device = model.device
        self.checkpoint_name = model.info.path.name
        self.checkpoint_hash = "" if model.info.is_folder else short_hash(model.info.path)
        self.alphas_cumprod = model.alphas_cumprod.to(self.device)
        self.sigmas = ladder_of(config, self.alphas_cumprod.cpu()).to(self.device)
        self.denoiser = GuidedDenoiser(model.predict, self.alphas_cumprod, model.prediction_type)
        self.decode_batch = config.rollout.decode_batch
        self._encoded: dict[str, Conditioning] = {}
        if config.model.gradient_checkpointing:
            self.set_gradient_checkpointing(True)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts and the negative prompt, once; all padded to the same number of chunks."""
        negative = self.config.prompt.negative_prompt
        wanted = list(dict.fromkeys(prompts))
        chunks = self.model.count_chunks([*wanted, negative])

        def encode(told: Sequence[str], is_negative: bool) -> Conditioning:
            return self.model.encode_prompts(
                told,
                clip_skip=self.config.model.clip_skip,
                width=self.config.prompt.width,
                height=self.config.prompt.height,
                chunks=chunks,
                negative=is_negative,
            )

        encoded = encode(wanted, False)
        self._encoded = {prompt: encoded.rows([row]) for row, prompt in enumerate(wanted)}
        self._negative = encode([negative], True)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """[N] rows for prompts that `prepare` has encoded."""
        return Conditioning.cat([self._encoded[prompt] for prompt in prompts])

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {
            "cond": self.conditioning(prompts),
            "uncond": self._negative.repeat(len(prompts)),
            "guidance_scale": self.config.rollout.guidance_scale,
        }

    def _start(self, draws: SeededDraws) -> Tensor:
        shape = (4, self.config.prompt.height // 8, self.config.prompt.width // 8)
        noise = draws.initial(shape).to(self.device)
        return noise * (1 + self.sigmas[0] ** 2).sqrt()  # x_vp starts as pure noise, as in the published code

    def rollout(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RolloutSettings,
        preference: PreferenceModel | None,
        watch: Callable[[PoolVerdict], None] | None,
    ) -> Rollout:
        """Sample one picture for each prompt; see `training.host.Host`."""
        draws = SeededDraws(seeds)
        return sample_spo(
            self.denoiser,
            self._start(draws),
            self.sigmas,
            self.arguments(prompts),
            settings=settings,
            draws=draws,
            alphas_cumprod=self.alphas_cumprod,
            scoring=None if preference is None else Scoring(preference, prompts, self.decode, watch),
            repeat=repeat_conditioning,
        )

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[str], step: Tensor) -> Tensor:
        """Denoised latents for the training step; see `training.host.Host`."""
        if not self.config.loss.train_guidance:
            return self.denoiser(x, sigma, self.conditioning(prompts))
        return self.denoiser(x, sigma, **self.arguments(prompts))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[N, 4, h, w] latents -> [N, 3, 8 h, 8 w] pictures about [-1, 1], not clamped, float32."""
        return self.model.decode(latents, decode_batch=self.decode_batch)

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """[N, 3, 8 h, 8 w] pictures in [-1, 1] -> [N, 4, h, w] float32 latents; `noise` as in `DiffusersModel`."""
        return self.model.encode(pictures, noise=noise)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], batch: int = 16) -> Tensor:
        """[N, 3, height, width] pictures in [-1, 1] on the CPU: ordinary ancestral sampling, no pools."""
        plain = RolloutSettings(candidates=1, eta=self.config.rollout.eta)
        pictures = []
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            latents = self.rollout(prompts[part], seeds[part], plain, None, None).x
            pictures.append(self.decode(latents).clamp(-1, 1).cpu())
        return torch.cat(pictures)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """See `training.host.Host`."""
        self.model.set_gradient_checkpointing(on)


def load_host(config: Config) -> HeadlessHost:
    """Load the configured checkpoint. Raises SpoError for what `load.load_model` refuses."""
    from spo.headless.load import load_model

    device = choose_device(config.model.device)
    model = load_model(
        config.model.checkpoint,
        device=device,
        dtype=choose_dtype(config.model.precision, device),
        vae_path=config.model.vae or None,
        prediction_type=None if config.model.prediction_type == "auto" else config.model.prediction_type,
    )
    return HeadlessHost(model, config)
