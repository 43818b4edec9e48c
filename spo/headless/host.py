"""Training and sampling without a WebUI: the host around a checkpoint that diffusers loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo.algorithm.denoiser import Conditioning, GuidedDenoiser
from spo.algorithm.preference import PreferenceModel
from spo.algorithm.rollout import PoolVerdict, Rollout, RolloutSettings, Scoring, sample_spo
from spo.checkpoint.hashes import short_hash
from spo.config import Config
from spo.headless.device import choose_device, choose_dtype
from spo.headless.load import load_model
from spo.headless.text import EncodedPrompts, count_chunks
from spo.headless.vae import OUT_OF_MEMORY_ADVICE
from spo.rng import SeededDraws
from spo.training.host import ladder_of
from spo.training.memory import halve_decode_batch, retry_with_less

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
        self.device, self.dtype = model.device, model.dtype
        self.checkpoint_name = model.info.path.name
        self.alphas_cumprod = model.alphas_cumprod.to(self.device)
        self.sigmas = ladder_of(config, self.alphas_cumprod.cpu()).to(self.device)
        self.denoiser = GuidedDenoiser(model.predict, self.alphas_cumprod, model.prediction_type)
        self.decode_batch = config.rollout.decode_batch
        self._encoded = EncodedPrompts()
        self._negative: Conditioning | None = None
        if config.model.gradient_checkpointing:
            self.set_gradient_checkpointing(True)

    @cached_property
    def checkpoint_hash(self) -> str:
        """Of the file, read once it is asked for; "" for a folder."""
        return "" if self.model.info.is_folder else short_hash(self.model.info.path)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are new and the negative prompt; features rest on the CPU until they are used.

        The text encoders leave the device and the memory afterwards. Called a second time with prompts that are new,
        they are read again and rest on the CPU from then on: who calls so often has prompts that change.
        """
        prompt = self.config.prompt
        chunks = count_chunks([*prompts, prompt.negative_prompt])
        is_known = chunks == self._encoded.chunks and self._negative is not None
        if is_known and all(text in self._encoded for text in prompts):
            self._encoded.keep(prompts)
            return

        def encode(texts: Sequence[str], chunks: int | None = None, negative: bool = False) -> Conditioning:
            return self.model.text_encoders.encode(
                texts,
                clip_skip=self.config.model.clip_skip,
                width=prompt.width,
                height=prompt.height,
                chunks=chunks,
                negative=negative,
            )

        self._encoded.fill(prompts, encode, chunks)
        is_first = self._negative is None
        self._negative = encode([prompt.negative_prompt], chunks, negative=True).to(self.device)
        self.model.rest_text_encoders(keep=not is_first)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """[N] rows on the device for prompts that `prepare` has encoded."""
        return self._encoded.take(prompts, self.device)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """See `training.host.Host`."""
        return self._encoded.means(prompts)

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {
            "cond": self.conditioning(prompts),
            "uncond": self._negative.repeat(len(prompts)) if self._negative is not None else None,
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
            scoring=None
            if preference is None
            else Scoring(preference, prompts, self.decode, watch, self.text_features(prompts)),
            repeat=repeat_conditioning,
        )

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[str], step: Tensor) -> Tensor:
        """Denoised latents for the training step; see `training.host.Host`."""
        if not self.config.loss.train_guidance:
            return self.denoiser(x, sigma, self.conditioning(prompts))
        return self.denoiser(x, sigma, **self.arguments(prompts))

    def decode(self, latents: Tensor) -> Tensor:
        """[N, 4, h, w] latents -> [N, 3, 8 h, 8 w] pictures about [-1, 1], not clamped, float32.

        When memory runs out, fewer are decoded at a time, for good; then in tiles. SpoError when that does not help.
        """

        def lessen() -> str | None:
            return halve_decode_batch(self) or self.model.decoder.lessen()

        return retry_with_less(
            lambda: self.model.decoder.decode(latents, self.decode_batch), lessen, warnings.warn, OUT_OF_MEMORY_ADVICE
        )

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """[N, 3, 8 h, 8 w] pictures in [-1, 1] -> [N, 4, h, w] float32 latents; `noise` as in `Vae.encode`."""
        return retry_with_less(
            lambda: self.model.vae.encode(pictures, noise=noise, batch=self.decode_batch),
            lambda: halve_decode_batch(self),
            warnings.warn,
            OUT_OF_MEMORY_ADVICE,
        )

    def set_gradient_checkpointing(self, on: bool) -> None:
        """See `training.host.Host`."""
        self.model.set_gradient_checkpointing(on)


def load_host(config: Config) -> HeadlessHost:
    """Load the configured checkpoint. Raises SpoError for what `load.load_model` refuses."""
    device = choose_device(config.model.device)
    model = load_model(
        config.model.checkpoint,
        device=device,
        dtype=choose_dtype(config.model.precision, device),
        vae_path=config.model.vae or None,
        prediction_type=None if config.model.prediction_type == "auto" else config.model.prediction_type,
        vae_dtype=None if config.model.vae_precision == "auto" else getattr(torch, config.model.vae_precision),
        vae_tiles=config.model.vae_tiles,
        vae_rests=config.model.rest_on_cpu,
        taesd_path=config.model.taesd or None,
        float8=config.model.weight_storage == "float8",
    )
    return HeadlessHost(model, config)
