"""The WebUI's loaded checkpoint as a `trainer.Host`. It is borrowed, never changed: use it inside `borrowed`.

Pictures are sampled through the WebUI's own processing, so that prompt weights, prompt editing, styles, clip skip, the
user's VAE, schedule types and LoRAs named in prompts work as in txt2img. Training runs the same network with gradients,
with the conditioning that the prompt had at the step a pair comes from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo.algorithm.preference import PreferenceModel
from spo.algorithm.rollout import PoolVerdict, Rollout, RolloutSettings
from spo.config import Config
from spo.errors import SpoError
from spo.progress import StopRequested
from spo.rng import SeededDraws
from spo.training.loop import ladder_of
from spo.webui import sampler

if TYPE_CHECKING:
    pass


def architecture_of(model: Any) -> str:
    """Which of "sd15" and "sdxl" the loaded model is. Raises SpoError for what cannot be trained; touches nothing."""
    from modules import lowvram, sd_unet, shared

    if model is None:
        raise SpoError("No checkpoint is loaded; choose one at the top of the page.")
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
    if sd_unet.current_unet is not None:
        raise SpoError('Another SD Unet (TensorRT or the like) is in use; set "SD Unet" to None in the settings.')
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


@contextmanager
def borrowed(config: Config) -> Iterator[WebUIHost]:
    """The loaded checkpoint as a host. Afterwards the active networks, the prompt history and the blocks are as before.

    Raises SpoError for a checkpoint that cannot be trained, before anything is touched. Hold the WebUI's queue.
    """
    host = WebUIHost(config)
    try:
        with users_state_kept():
            try:
                yield host
            finally:
                host.set_gradient_checkpointing(False)
    finally:
        host.mend()


@contextmanager
def users_state_kept() -> Iterator[None]:
    """Sampling inside leaves the active networks and the prompt history as they were."""
    from modules import shared

    networks = _active_networks()
    history = shared.cmd_opts.no_prompt_history
    shared.cmd_opts.no_prompt_history = True  # our sampling must not become the user's last prompt
    try:
        yield
    finally:
        shared.cmd_opts.no_prompt_history = history
        for put_back in networks:
            put_back()


def _active_networks() -> list[Callable[[], None]]:
    """What makes the hypernetworks and LoRAs of now active again, at their multipliers; weights follow when used."""
    from modules import shared

    def keeper(active: list[Any]) -> Callable[[], None]:
        noted = [(network, dict(vars(network))) for network in active]

        def put_back() -> None:
            active[:] = [network for network, _ in noted]
            for network, values in noted:
                vars(network).update(
                    {key: value for key, value in values.items() if "multiplier" in key or key == "dyn_dim"}
                )

        return put_back

    lora = sys.modules.get("networks")  # of the built-in Lora extension
    return [keeper(active) for active in (shared.loaded_hypernetworks, getattr(lora, "loaded_networks", []))]


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _networks_named(prompt: str) -> str:
    """The extra networks of a prompt, as a text to compare."""
    from modules import extra_networks

    found = extra_networks.parse_prompt(prompt)[1]
    return " ".join(f"<{kind}:{':'.join(one.items)}>" for kind in sorted(found) for one in found[kind])


class WebUIHost:
    """A `trainer.Host` over `shared.sd_model`. See there for the methods."""

    naming = "ldm"

    def __init__(self, config: Config) -> None:
        from modules import sd_models, shared

        self.model = sd_models.model_data.get_sd_model()
        self.config = config
        self.architecture = architecture_of(self.model)
        self.prediction_type = "v_prediction" if self.model.parameterization == "v" else "epsilon"
        self.network = self.model.model.diffusion_model
        self.device = shared.device
        self.info = self.model.sd_checkpoint_info
        self.checkpoint_name, self.checkpoint_hash = self.info.name_for_extra, self.info.shorthash or ""
        self.decode_batch = config.rollout.decode_batch
        self._place = next(self.network.parameters()).device
        self.prompts: list[str] = []
        self.last_prompts: list[str] = []
        self._conditions: dict[str, Any] = {}
        if config.model.gradient_checkpointing:
            self.set_gradient_checkpointing(True)

    @property
    def alphas_cumprod(self) -> Tensor:
        """[1000] the loaded model's training schedule."""
        return self.model.alphas_cumprod

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute the transformer and residual blocks in the backward pass, or not; leaves no trace when off."""
        for block in self.network.modules():
            if type(block).__name__ in ("BasicTransformerBlock", "ResBlock"):
                block.__dict__.pop("forward", None)
                if on:
                    block.forward = partial(_checkpointed, block.forward)

    def check(self) -> None:
        """SpoError when the checkpoint was switched or moved since training began."""
        from modules import sd_models

        switched = sd_models.model_data.sd_model is not self.model or self.model.sd_checkpoint_info is not self.info
        if switched or next(self.network.parameters()).device != self._place:
            raise SpoError(
                f"{self.checkpoint_name} was {'switched' if switched else 'unloaded'} while it was being trained, so "
                "the run has ended. Load it again and resume, to go on from the last saved state."
            )

    def mend(self) -> None:
        """Load a checkpoint once more that was put in the place of ours while our adapters were in its modules."""
        from modules import sd_models

        if sd_models.model_data.sd_model is self.model and self.model.sd_checkpoint_info is not self.info:
            sd_models.reload_model_weights(self.model, info=self.model.sd_checkpoint_info, forced_reload=True)

    # ---- prompts

    def prepare(self, prompts: Sequence[str]) -> None:
        """Make the networks active that the prompts name. The WebUI encodes when it samples.

        Raises SpoError when prompts name different networks, since the WebUI's batches use those of the first.
        """
        from modules import extra_networks

        self._conditions.clear()
        self.prompts = list(prompts)
        named = {_networks_named(prompt): prompt for prompt in prompts}
        if len(named) > 1:
            first, second = list(named.values())[:2]
            raise SpoError(
                f'All training prompts must name the same LoRAs; "{first}" and "{second}" differ. '
                "Give them the same ones, or train without."
            )
        p = self._processing(prompts[:1], [0])
        p.all_prompts = list(prompts[:1])
        with torch.no_grad(), self._autocast():
            extra_networks.activate(p, extra_networks.parse_prompts(list(prompts[:1]))[1])

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
        from modules import processing, shared

        def seen(verdict: PoolVerdict) -> None:
            self.check()
            if watch is not None:
                watch(verdict)

        self.last_prompts = list(prompts)
        while True:
            self.check()
            task = sampler.RolloutTask(settings, preference, list(prompts), SeededDraws(seeds), self.decode, seen)
            p = self._processing(prompts, seeds)
            try:
                with sampler.task_for_sampler(task):
                    processing.process_images(p)
            except Exception:
                self.check()  # a switched checkpoint fails in many ways; say what it was
                raise
            finally:
                p.close()
            self.check()
            if task.rollout is not None:
                return task.rollout
            if not shared.state.skipped:
                raise StopRequested
            shared.state.skipped = False  # the WebUI's Skip button means pictures, not training

    def _processing(self, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        """The WebUI's txt2img for these prompts, up to the latents: nothing is decoded, nothing is saved."""
        from modules import processing

        class UpToLatents(processing.StableDiffusionProcessingTxt2Img):
            def sample(self, *args: Any, **kwargs: Any) -> Any:
                self.rng = _InitialNoise(draws, (4, self.height // 8, self.width // 8))
                super().sample(*args, **kwargs)
                done = processing.DecodedSamples()
                done.extend([torch.zeros(3, 8, 8)] * len(self.prompts))
                return done

            def get_token_merging_ratio(self, for_hr: bool = False) -> float:
                return 0.0  # the training step does not merge either

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
            scheduler="Automatic",  # its ladder gives way to ours
            do_not_save_samples=True,
            do_not_save_grid=True,
        )
        p.sampler_noise_scheduler_override = lambda steps: self.ladder()
        return p

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[N, 4, h, w] latents -> [N, 3, 8 h, 8 w] pictures in [-1, 1], float32, by the user's VAE and method."""
        from modules import sd_samplers_common

        parts = latents.split(self.decode_batch)
        pixels = [sd_samplers_common.decode_first_stage(self.model, part).float() for part in parts]
        return torch.cat(pixels).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """[N, 3, H, W] pictures in [-1, 1] -> [N, 4, H / 8, W / 8] float32 latents by the user's VAE.

        noise  [N, 4, H / 8, W / 8] draws from the encoding; None: its mean. SDXL's stage draws by itself
        """
        from modules import devices

        stage = self.model.first_stage_model
        with devices.without_autocast():
            encoded = self.model.encode_first_stage(pixels.to(next(stage.parameters()).dtype))
            if isinstance(encoded, Tensor):
                return self.model.get_first_stage_encoding(encoded).float()
            latents = encoded.mode() if noise is None else encoded.mean + encoded.std * noise.to(encoded.mean)
            return (self.model.scale_factor * latents).float()

    # ---- training

    def denoise(self, x: Tensor, sigma: Tensor, prompts: Sequence[str], step: Tensor) -> Tensor:
        """Denoised latents with gradient, each with the conditioning its prompt had at its step; see `trainer.Host`."""
        self.check()
        guidance = self.config.rollout.guidance_scale if self.config.loss.train_guidance else 1.0
        told = [self._told(prompt, at) for prompt, at in zip(prompts, step.tolist(), strict=True)]
        inner = self._inner_model()
        if len({length for one in told for length in one.lengths()}) == 1:
            groups = [list(range(len(told)))]
        else:  # prompts of different lengths cannot share a call
            groups = [[n] for n in range(len(told))]
        with self._autocast():
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
