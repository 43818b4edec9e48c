"""The WebUI's loaded checkpoint as a `training.host.Host`. It is borrowed, never changed: use it inside `borrowed`.

Pictures are sampled through the WebUI's own processing, so that prompt weights, prompt editing, styles, clip skip, the
user's VAE and LoRAs named in prompts work as in txt2img. Training runs the same network with gradients, with the
conditioning that the prompt had at the step a pair comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.algorithm.preference import PreferenceModel
from spo.algorithm.rollout import PoolVerdict, Rollout, RolloutSettings, Scoring, sample_spo
from spo.config import Config
from spo.errors import SpoError
from spo.progress import StopRequested
from spo.rng import SeededDraws
from spo.training.host import ladder_of
from spo.webui.seam import webui


@contextmanager
def borrowed(config: Config, *, training: bool = False, again: bool = False) -> Iterator[WebUIHost]:
    """The loaded checkpoint as a host. Afterwards everything of the WebUI's is as before. Hold the WebUI's queue.

    again  it was borrowed before: loaded afresh where others have chosen another one since

    Raises SpoError, before anything is touched, for a checkpoint that cannot be sampled step by step or, in training,
    not be trained, and for another one than the configuration's.
    """
    if again:
        webui.load_again(Path(config.model.checkpoint))
    elif webui.other_left_loaded():
        webui.swap_back()
    checkpoint = webui.loaded_checkpoint()
    if config.model.checkpoint not in ("", str(checkpoint.file)):
        raise SpoError(
            f"The checkpoint was changed to {checkpoint.name} while this waited in the WebUI's queue; start it again."
        )
    if training:
        webui.refuse_training(checkpoint)
    try:
        with webui.pinned(checkpoint), webui.trainable(checkpoint):
            host = WebUIHost(config, checkpoint)
            try:
                yield host
            finally:
                host.set_gradient_checkpointing(False)
    finally:
        webui.load_afresh(checkpoint)


class WebUIHost:
    """A `training.host.Host` over the loaded checkpoint. See there for the methods."""

    naming = "ldm"

    def __init__(self, config: Config, checkpoint: webui.Checkpoint) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.architecture = checkpoint.architecture
        self.prediction_type = checkpoint.prediction_type
        self.network = checkpoint.network
        self.checkpoint_name, self.checkpoint_hash = checkpoint.name, checkpoint.hash
        self.device, self.dtype = webui.device(), webui.compute_dtype()
        self.decode_batch = config.rollout.decode_batch
        self.prompts: list[str] = []
        self.last_prompts: list[str] = []
        self._encoded: webui.EncodedPrompts | None = None
        webui.network_to_card(checkpoint)
        self._place = next(self.network.parameters()).device
        if config.model.gradient_checkpointing:
            self.set_gradient_checkpointing(True)

    @property
    def alphas_cumprod(self) -> Tensor:
        """[1000] the loaded model's training schedule."""
        return self.checkpoint.alphas_cumprod

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute blocks in the backward pass, or not."""
        webui.set_gradient_checkpointing(self.network, on)

    def check(self) -> None:
        """SpoError when the checkpoint was switched or moved since training began."""
        switched = not webui.is_loaded(self.checkpoint)
        if switched or webui.has_moved(self.checkpoint, self._place):
            raise SpoError(
                f"{self.checkpoint_name} was {'switched' if switched else 'unloaded'} while it was being trained, so "
                "the run has ended. Load it again and resume, to go on from the last saved state."
            )

    # ---- prompts

    def prepare(self, prompts: Sequence[str]) -> None:
        """Make the networks active that the prompts name, and encode all prompts, with the settings of now.

        Raises SpoError when prompts name different networks, since the WebUI's batches use those of the first.
        """
        self.prompts = list(prompts)
        by_networks = {" ".join(webui.networks_of(prompt)): prompt for prompt in prompts}
        if len(by_networks) > 1:
            first, second = list(by_networks.values())[:2]
            raise SpoError(
                f'All training prompts must name the same LoRAs; "{first}" and "{second}" differ. '
                "Give them the same ones, or train without."
            )
        webui.activate_networks(prompts[0])
        size = self.config.prompt
        self._encoded = webui.encode_prompts(
            self.checkpoint, prompts, size.negative_prompt, len(self.ladder()) - 1, size.width, size.height
        )
        webui.network_to_card(self.checkpoint)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """See `training.host.Host`."""
        assert self._encoded is not None
        return self._encoded.text_features(prompts)

    def ladder(self) -> Tensor:
        """[T + 1] noise levels: the configured ones, on the loaded model's own schedule."""
        return ladder_of(self.config, self.alphas_cumprod.float().cpu())

    # ---- sampling

    def rollout(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: RolloutSettings,
        preference: PreferenceModel | None,
        watch: Callable[[PoolVerdict], None] | None,
    ) -> Rollout:
        """Through the WebUI's processing and its CFG denoiser; see `training.host.Host`."""
        draws, rollouts = SeededDraws(seeds), list[Rollout]()

        def checked_watch(verdict: PoolVerdict) -> None:
            self.check()
            if watch is not None:
                watch(verdict)

        scoring = None
        if preference is not None:
            text = self.text_features(prompts)
            scoring = Scoring(preference, list(prompts), self.decode, checked_watch, text)

        def sample(
            model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any], **others: Any
        ) -> Tensor:
            def at_its_step(x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
                # the CFG denoiser counts its calls as steps, which prompt editing goes by; a pool may take several
                model.step = int((sigmas - sigma[0]).abs().argmin())  # type: ignore[attr-defined]
                return model(x, sigma, **arguments)

            rollout = sample_spo(
                at_its_step, x, sigmas, extra_args, others.get("callback"),
                settings=settings, draws=draws, alphas_cumprod=self.alphas_cumprod.cpu(), scoring=scoring,
                repeat=webui.repeat_arguments,
            )  # fmt: skip
            rollouts.append(rollout)
            return rollout.x

        size = self.config.prompt
        noise = draws.initial((4, size.height // 8, size.width // 8))
        own = webui.OwnSampling(sample, self.ladder(), noise, self._encoded)
        webui.keep_adapter_precision(self.network)
        self.last_prompts = list(prompts)
        while True:
            self.check()
            try:
                pictures = webui.txt2img(self._request(prompts, seeds), own)
            except Exception:
                self.check()  # a switched checkpoint fails in many ways; say what it was
                raise
            self.check()
            if rollouts:
                return rollouts[0]
            if not pictures.skipped:  # the WebUI's Skip button means pictures, not training
                raise StopRequested

    def picture(self, prompt: str, seed: int, infotext_prompt: str) -> webui.Pictures:
        """One ordinary picture of the network as it is now, made by Euler a."""
        return webui.txt2img(self._request([prompt], [seed], infotext_prompt))

    def _request(self, prompts: Sequence[str], seeds: Sequence[int], infotext_prompt: str = "") -> webui.PictureRequest:
        return webui.PictureRequest(
            prompts,
            seeds,
            self.config.prompt.negative_prompt,
            len(self.ladder()) - 1,
            self.config.rollout.guidance_scale,
            self.config.prompt.width,
            self.config.prompt.height,
            infotext_prompt=infotext_prompt,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """[N, 4, h, w] latents -> [N, 3, 8 h, 8 w] pictures about [-1, 1], float32, by the user's VAE and method."""
        parts = [webui.decode(self.checkpoint, part) for part in latents.split(self.decode_batch)]
        return torch.cat(parts)

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """[N, 3, 8 h, 8 w] pictures in [-1, 1] -> [N, 4, h, w] float32 latents by the user's VAE; see `Host`."""
        return webui.encode(self.checkpoint, pictures, noise)

    # ---- training

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[str], step: Tensor) -> Tensor:
        """Denoised latents with gradient, each with the conditioning its prompt had at its step; see `Host`."""
        self.check()
        guidance = self.config.rollout.guidance_scale if self.config.loss.train_guidance else 1.0
        assert self._encoded is not None
        conditioning = [
            self._encoded.at(prompt, n, self.device) for prompt, n in zip(prompts, step.tolist(), strict=True)
        ]
        webui.keep_adapter_precision(self.network)
        inner = webui.denoiser(self.checkpoint)
        if len({length for one in conditioning for length in one.lengths()}) == 1:
            groups = [list(range(len(conditioning)))]
        else:  # prompts of different lengths cannot share a call
            groups = [[n] for n in range(len(conditioning))]
        with webui.autocast():
            parts = [
                _denoise_group(inner, x[rows], sigma[rows], [conditioning[n] for n in rows], guidance)
                for rows in groups
            ]
        return torch.cat(parts).float()


def _denoise_group(
    inner: Any, x: Tensor, sigma: Tensor, conditioning: Sequence[webui.StepConditioning], guidance: float
) -> Tensor:
    """[N, ...] denoised by one call (two where the lengths of positive and negative prompts differ)."""
    counts = [len(one.weights) for one in conditioning]
    rows = torch.repeat_interleave(torch.arange(len(conditioning)), torch.tensor(counts)).tolist()
    everyone = list(range(len(conditioning)))
    positive, negative = [one.cond for one in conditioning], [one.uncond for one in conditioning]
    base: Tensor | None = None
    if guidance == 1:
        outputs = webui.evaluate(inner, x[rows], sigma[rows], positive)
    elif len({length for one in conditioning for length in one.lengths()}) == 1:
        both = webui.evaluate(inner, x[rows + everyone], sigma[rows + everyone], positive + negative)
        outputs, base = both[: len(rows)], both[len(rows) :]
    else:
        outputs = webui.evaluate(inner, x[rows], sigma[rows], positive)
        base = webui.evaluate(inner, x, sigma, negative)
    denoised = []
    for n, (one, parts) in enumerate(zip(conditioning, outputs.split(counts), strict=True)):
        if base is None:  # without guidance, the parts of a prompt with AND by their weights
            total = sum(weight for _, weight in one.weights)
            denoised.append(sum(parts[i] * weight for i, weight in one.weights) / total)
        else:  # the WebUI's CFGDenoiser.combine_denoised
            denoised.append(base[n] + sum((parts[i] - base[n]) * (weight * guidance) for i, weight in one.weights))
    return torch.stack(denoised)
