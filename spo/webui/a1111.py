"""The seam to AUTOMATIC1111's WebUI 1.10.1: the only file that imports `modules.*` and what the WebUI brings along
(ldm, sgm, k_diffusion, launch, the Lora extension's `networks`).

One flat surface of functions and a few records: paths and options, the checkpoint, its network and VAE, prompts,
pictures (`txt2img`), networks named in prompts, the queue with its progress bar, and the page. What another WebUI does
otherwise is another file with these names. The WebUI's modules are imported where they are used, so that this file can
be imported where there is no WebUI. What is `Any` here is an object of the WebUI's own, handed back to it as it came.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo.errors import SpoError

if TYPE_CHECKING:
    from PIL.Image import Image

# ---------------------------------------------------------------------------------------------------- paths and options


def lora_folder() -> Path:
    """--lora-dir, or models/Lora."""
    from modules import shared

    return Path(shared.cmd_opts.lora_dir).absolute()


def models_folder() -> Path:
    """The WebUI's models/."""
    from modules import paths_internal

    return Path(paths_internal.models_path).absolute()


def checkpoint_folder() -> Path | None:
    """--ckpt-dir; None when checkpoints are in models/Stable-diffusion only."""
    from modules import shared

    return Path(shared.cmd_opts.ckpt_dir) if shared.cmd_opts.ckpt_dir else None


def refresh_checkpoints() -> None:
    """Let the WebUI find new checkpoint files."""
    from modules import shared

    shared.refresh_checkpoints()


def device() -> torch.device:
    """Where the WebUI computes."""
    from modules import shared

    return shared.device


def clip_skip() -> int:
    """The Clip skip setting: 1 is the text encoder's last layer."""
    from modules import shared

    return int(shared.opts.CLIP_stop_at_last_layers)


def api_wanted() -> bool:
    """Whether the WebUI serves an API at all (--api or --nowebui)."""
    from modules import shared

    return bool(shared.cmd_opts.api or shared.cmd_opts.nowebui)


def api_auth() -> bool:
    """Whether the API asks for credentials (--api-auth)."""
    from modules import shared

    return bool(shared.cmd_opts.api_auth)


def api_credentials() -> list[bytes]:
    """The "user:password" of --api-auth in UTF-8, each of which opens the API."""
    from modules import shared

    pairs = [pair.strip() for pair in (shared.cmd_opts.api_auth or "").split(",")]
    return [pair.encode("utf-8", "surrogateescape") for pair in pairs if ":" in pair]


def style_names() -> list[str]:
    """The user's styles, without the headings that the WebUI keeps among them, which have no text."""
    from modules import shared

    return [name for name, style in shared.prompt_styles.styles.items() if style.prompt is not None]


def with_styles(prompt: str, names: Sequence[str], *, negative: bool = False) -> str:
    """A positive or negative prompt with these styles put on."""
    from modules import shared

    styles = shared.prompt_styles
    apply = styles.apply_negative_styles_to_prompt if negative else styles.apply_styles_to_prompt
    return str(apply(prompt, list(names)))


# ------------------------------------------------------------------------------------------------------- the checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as the WebUI has loaded it.

    model, info      the WebUI's own objects: the model in memory, and its record of the file
    name, hash       of the file, without its ending; the hash may be ""
    file             the file itself
    architecture     "sd15" or "sdxl"; prediction_type: "epsilon" or "v_prediction"
    """

    model: Any
    info: Any
    name: str
    hash: str
    file: Path
    architecture: str
    prediction_type: str

    @property
    def network(self) -> nn.Module:
        """The UNet, with modules called as in ldm and sgm."""
        return self.model.model.diffusion_model

    @property
    def alphas_cumprod(self) -> Tensor:
        """[1000] the training schedule; the WebUI's settings may change it, so it is read anew each time."""
        return self.model.alphas_cumprod


def loaded_checkpoint() -> Checkpoint:
    """The loaded checkpoint. Raises SpoError for none, and for what cannot be sampled or trained; touches nothing."""
    from modules import sd_models, sd_unet

    model = sd_models.model_data.get_sd_model()
    if model is None:
        raise SpoError("No checkpoint is loaded; choose one at the top of the page.")
    info = getattr(model, "sd_checkpoint_info", None)
    title = getattr(info, "title", "the loaded checkpoint")
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if getattr(model, "is_sd3", False) or network is None:
        raise SpoError(f"{title} is not SD1.5 or SDXL, so it cannot be trained here; load another checkpoint.")
    if getattr(model, "is_sd2", False):
        raise SpoError(f"{title} is a Stable Diffusion 2 checkpoint; load an SD1.5 or SDXL one.")
    inputs = next(network.input_blocks[0].parameters()).shape[1]
    if inputs != 4:
        raise SpoError(f"{title} takes {inputs} channels (inpainting or editing); load a text-to-image checkpoint.")
    if _is_refiner(model):
        raise SpoError(f"{title} is an SDXL refiner; load the base checkpoint.")
    _refuse_low_memory_modes(model)
    if sd_unet.current_unet is not None:
        raise SpoError('Another SD Unet (TensorRT or the like) is in use; set "SD Unet" to None in the settings.')
    return Checkpoint(
        model=model,
        info=info,
        name=getattr(info, "name_for_extra", ""),
        hash=getattr(info, "shorthash", "") or "",
        file=Path(getattr(info, "filename", "")),
        architecture=_architecture(model),
        prediction_type="v_prediction" if getattr(model, "parameterization", "eps") == "v" else "epsilon",
    )


def _architecture(model: Any) -> str:
    return "sdxl" if getattr(model, "is_sdxl", False) else "sd15"


def _is_refiner(model: Any) -> bool:
    """The refiner has one text encoder, OpenCLIP's; the base has CLIP's beside it."""
    return getattr(model, "is_sdxl", False) and not any(
        type(embedder).__name__.startswith("FrozenCLIP") for embedder in model.conditioner.embedders
    )


def _refuse_low_memory_modes(model: Any) -> None:
    from modules import lowvram, shared

    if lowvram.is_enabled(model) or shared.cmd_opts.lowvram:
        raise SpoError("The WebUI runs with --lowvram or --medvram, which moves the network about; start it without.")


@dataclass(frozen=True)
class Glance:
    """The loaded checkpoint for the page, without loading one: its architecture, "" for none; its file's name."""

    architecture: str = ""
    file_name: str = ""


def glance() -> Glance:
    """The loaded checkpoint as far as it is loaded by now, of whatever kind it is."""
    from modules import sd_models

    model = sd_models.model_data.sd_model
    if model is None:
        return Glance()
    return Glance(_architecture(model), Path(model.sd_checkpoint_info.filename).name)


def is_loaded(checkpoint: Checkpoint) -> bool:
    """Whether this checkpoint is still the loaded one: the same model in memory, with the weights of the same file."""
    from modules import sd_models

    return sd_models.model_data.sd_model is checkpoint.model and checkpoint.model.sd_checkpoint_info is checkpoint.info


def load_afresh(checkpoint: Checkpoint) -> None:
    """Load a checkpoint once more that was put in the place of this one while our adapters were in its modules."""
    from modules import sd_models

    model = checkpoint.model
    if sd_models.model_data.sd_model is model and model.sd_checkpoint_info is not checkpoint.info:
        sd_models.reload_model_weights(model, info=model.sd_checkpoint_info, forced_reload=True)


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


# ------------------------------------------------------------------------------------------------- the network, the VAE


def denoiser(checkpoint: Checkpoint) -> Any:
    """The network as k-diffusion's samplers see it, for `evaluate`: its output turned into the clean latent."""
    import k_diffusion.external
    from modules import shared

    constructor = getattr(checkpoint.model, "create_denoiser", None)
    if constructor is not None:
        return constructor()
    external = k_diffusion.external
    wrapper = external.CompVisVDenoiser if checkpoint.prediction_type == "v_prediction" else external.CompVisDenoiser
    return wrapper(checkpoint.model, quantize=shared.opts.enable_quantization)


def evaluate(inner: Any, x: Tensor, sigma: Tensor, conditioning: Sequence[Any]) -> Tensor:
    """[N, C, H, W] denoised by a `denoiser` in one call; no guidance.

    x [N, C, H, W] VE; sigma [N]; conditioning: tensors [k, L, D], or SDXL's dicts of such, N rows in all, one L
    """
    image = x.new_zeros(len(x), 5, 1, 1)  # the WebUI's stand-in for models without image conditioning
    text: dict[str, Any]
    if isinstance(conditioning[0], dict):
        text = {key: torch.cat([one[key] for one in conditioning]) for key in conditioning[0]}
    else:
        text = {"c_crossattn": [torch.cat(list(conditioning))]}
    return inner(x, sigma, cond={**text, "c_concat": [image]})


def autocast() -> AbstractContextManager[Any]:
    """The precision in which the WebUI runs the network."""
    from modules import devices

    return devices.without_autocast() if devices.unet_needs_upcast else devices.autocast()


def set_gradient_checkpointing(network: nn.Module, on: bool) -> None:
    """Recompute the transformer and residual blocks in the backward pass, or not; leaves no trace when off.

    The blocks' own `use_checkpoint` fails when the weights are frozen, and the WebUI turns it off.
    """
    for block in network.modules():
        if type(block).__name__ in ("BasicTransformerBlock", "ResBlock"):
            block.__dict__.pop("forward", None)
            if on:
                block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@torch.no_grad()
def decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """[N, 4, h, w] latents -> [N, 3, 8 h, 8 w] float32, about [-1, 1], by the user's VAE and decode method."""
    from modules import sd_samplers_common

    return sd_samplers_common.decode_first_stage(checkpoint.model, latents).float()


@torch.no_grad()
def encode(checkpoint: Checkpoint, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
    """[N, 3, H, W] pictures in [-1, 1] -> [N, 4, H / 8, W / 8] float32 latents by the user's VAE.

    noise  [N, 4, H / 8, W / 8] draws from the encoding; None: its mean. SDXL's stage draws by itself
    """
    from modules import devices

    model = checkpoint.model
    with devices.without_autocast():
        encoded = model.encode_first_stage(pictures.to(next(model.first_stage_model.parameters()).dtype))
        if isinstance(encoded, Tensor):
            return model.get_first_stage_encoding(encoded).float()
        latents = encoded.mode() if noise is None else encoded.mean + encoded.std * noise.to(encoded.mean)
        return (model.scale_factor * latents).float()


# -------------------------------------------------------------------------------------------------------------- prompts


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
class EncodedPrompt:
    """A positive and the negative prompt with what they are at every step, as the WebUI's processing makes them."""

    positive: Any
    negative: Any

    def at(self, step: int) -> StepConditioning:
        """At step number `step`, 0-based: prompt editing and AND count."""
        from modules import prompt_parser

        weights, cond = prompt_parser.reconstruct_multicond_batch(self.positive, step)
        return StepConditioning(cond, tuple(weights[0]), prompt_parser.reconstruct_cond_batch(self.negative, step))


def encode_prompt(
    checkpoint: Checkpoint, prompt: str, negative_prompt: str, steps: int, width: int, height: int
) -> EncodedPrompt:
    """Both prompts through the text encoders, for `steps` steps; the active networks count. width, height in pixels."""
    from modules import prompt_parser

    def conditioning(text: str, negative: bool) -> Any:
        return prompt_parser.SdConditioning([text], width=width, height=height, is_negative_prompt=negative)

    model = checkpoint.model
    with torch.no_grad(), autocast():
        positive = prompt_parser.get_multicond_learned_conditioning(
            model, conditioning(prompt_text(prompt), False), steps
        )
        negative = prompt_parser.get_learned_conditioning(model, conditioning(negative_prompt, True), steps)
    return EncodedPrompt(positive, negative)


# ------------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class PictureRequest:
    """Ordinary txt2img pictures, one for each prompt and seed, in one batch.

    sampler          the WebUI's name of it; its schedule is the automatic one
    infotext_prompt  stands in the infotext in place of the first prompt; "": the prompt itself
    notes            what the infotext says besides
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    negative_prompt: str
    steps: int
    guidance_scale: float
    width: int
    height: int
    sampler: str = "Euler a"
    infotext_prompt: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OwnSampling:
    """A sampler function of ours in the WebUI's loop, in place of the request's.

    function  k-diffusion's signature, `f(model, x, sigmas, extra_args, callback, disable)`; model: the CFG denoiser
    sigmas    [steps + 1] noise levels
    noise     [B, 4, h, w] standard normal, the latents to begin with
    """

    function: Callable[..., Tensor]
    sigmas: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Pictures:
    """images: as the WebUI shows them, none from `OwnSampling`; latents [B, 4, h, w], None when there are none.

    infotext            of the first picture
    interrupted, skipped  the user's Interrupt or Stop, and Skip: what there is is unfinished
    """

    images: list[Image]
    latents: Tensor | None
    infotext: str
    interrupted: bool
    skipped: bool


def txt2img(request: PictureRequest, sampling: OwnSampling | None = None) -> Pictures:
    """The WebUI's own processing, with styles, scripts and saving left out; nothing comes on its disk.

    sampling  up to the latents only, by our own sampler function: nothing is decoded
    """
    from modules import processing, sd_samplers_common, sd_samplers_kdiffusion, shared

    class Processing(processing.StableDiffusionProcessingTxt2Img):
        latents: Tensor | None = None

        def sample(self, conditioning: Any, unconditional_conditioning: Any, *args: Any, **kwargs: Any) -> Any:
            if sampling is None:
                self.latents = super().sample(conditioning, unconditional_conditioning, *args, **kwargs)
                return self.latents
            self.sampler = Sampler(sampling.function, self.sd_model)
            self.sampler.config = sd_samplers_common.SamplerData("SPO", Sampler, [], {})
            x = sampling.noise.to(shared.device)
            image = self.txt2img_image_conditioning(x)
            self.latents = self.sampler.sample(
                self, x, conditioning, unconditional_conditioning, image_conditioning=image
            )
            undecoded = processing.DecodedSamples()
            undecoded.extend([torch.zeros(3, 8, 8)] * len(self.prompts))
            return undecoded

        def get_token_merging_ratio(self, for_hr: bool = False) -> float:
            if sampling is None:
                return float(super().get_token_merging_ratio(for_hr))
            return 0.0  # the training step does not merge either

    class Sampler(sd_samplers_kdiffusion.KDiffusionSampler):
        def get_sigmas(self, p: Any, steps: int) -> Tensor:
            assert sampling is not None
            return sampling.sigmas

    p = Processing(
        prompt=list(request.prompts),
        negative_prompt=[request.negative_prompt] * len(request.prompts),
        seed=[seed % 2**32 for seed in request.seeds],
        subseed=[0] * len(request.prompts),
        batch_size=len(request.prompts),
        steps=request.steps,
        cfg_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        sampler_name=request.sampler,
        scheduler="Automatic",
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    try:
        processed = processing.process_images(p)
        interrupted, skipped = shared.state.interrupted or shared.state.stopping_generation, shared.state.skipped
        shared.state.skipped = False
        if sampling is not None or not processed.images:
            return Pictures([], p.latents, "", interrupted, skipped)
        p.extra_generation_params |= request.notes
        p.all_prompts = [request.infotext_prompt or p.all_prompts[0], *p.all_prompts[1:]]
        p.prompts = p.all_prompts
        infotext = processing.create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds)
        images = processed.images[processed.index_of_first_image :]
        return Pictures(images, p.latents, infotext, interrupted, skipped)
    finally:
        p.close()


def repeat_arguments(extra_args: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """The CFG denoiser's arguments for `count` candidates of every image, candidate-major, in one call of it.

    One call, so that its step counter, which prompt editing goes by, advances once a step.
    """
    from modules.prompt_parser import MulticondLearnedConditioning

    cond, image = extra_args["cond"], extra_args["image_cond"]
    return {
        **extra_args,
        "cond": MulticondLearnedConditioning((len(cond.batch) * count,), list(cond.batch) * count),
        "uncond": list(extra_args["uncond"]) * count,
        "image_cond": image.repeat(count, *[1] * (image.ndim - 1)),
    }


def sampler_names(*, hidden_too: bool = False) -> list[str]:
    """The WebUI's samplers: those it shows, or all."""
    from modules import sd_samplers

    samplers = sd_samplers.all_samplers if hidden_too else sd_samplers.visible_samplers()
    return [sampler.name for sampler in samplers]


def save_grid(picture: Image, prompt: str, seed: int, infotext: str) -> Path:
    """Save a picture where the WebUI's txt2img grids go, under a new name that begins with spo-compare."""
    from modules import images, shared

    path, _ = images.save_image(
        picture,
        shared.opts.outdir_grids or shared.opts.outdir_txt2img_grids,
        "spo-compare",
        seed=seed,
        prompt=prompt,
        extension=shared.opts.grid_format,
        info=infotext,
        short_filename=True,
        grid=True,
    )
    return Path(path).absolute()


def prompt_of_picture(picture: Image) -> str:
    """The prompt in a picture's infotext; "" without one."""
    from modules import images, infotext_utils

    infotext, _ = images.read_info_from_image(picture)
    return str(infotext_utils.parse_generation_parameters(infotext).get("Prompt", "")) if infotext else ""


# --------------------------------------------------------------------------------------------- LoRAs and other networks


@dataclass(frozen=True)
class KnownLora:
    """A LoRA file as prompts know it: by its stem. metadata: the file's."""

    file: Path
    metadata: Mapping[str, Any]


def known_loras() -> dict[str, KnownLora] | None:
    """By the name in prompts. None: the WebUI's Lora extension is switched off."""
    extension = _lora_extension()
    if extension is None:
        return None
    return {
        name: KnownLora(Path(entry.filename), entry.metadata) for name, entry in extension.available_networks.items()
    }


def refresh_loras() -> None:
    """Let the WebUI find new LoRA files, so that prompts can use them at once."""
    extension = _lora_extension()
    if extension is not None:
        extension.list_available_networks()


def _lora_extension() -> Any:
    """The module `networks` of the built-in Lora extension, None when it is off. Imported by the WebUI, never by us."""
    return sys.modules.get("networks")


def _active_networks() -> list[Callable[[], None]]:
    """What makes the hypernetworks and LoRAs of now active again, at their multipliers; weights follow when used."""
    from modules import shared

    def reactivation(active: list[Any]) -> Callable[[], None]:
        before = [(network, dict(vars(network))) for network in active]

        def put_back() -> None:
            active[:] = [network for network, _ in before]
            for network, values in before:
                vars(network).update(
                    {key: value for key, value in values.items() if "multiplier" in key or key == "dyn_dim"}
                )

        return put_back

    lora = _lora_extension()
    return [reactivation(active) for active in (shared.loaded_hypernetworks, getattr(lora, "loaded_networks", []))]


# ----------------------------------------------------------------------------------------------- queue and progress bar


def new_task(kind: str, *, queued: bool) -> str:
    """The name of a task, by which the page's script asks for its progress; queued: to be begun by `in_queue`."""
    from modules import progress

    task = progress.create_task_id(kind)
    if queued:
        progress.add_task_to_queue(task)
    return str(task)


@contextmanager
def in_queue(job: str, task: str = "") -> Iterator[None]:
    """Wait for the WebUI's queue and hold it, so that nothing else samples meanwhile. It is not re-entrant.

    job  what the WebUI calls the work; task: of `new_task`, when the page is to follow it
    """
    from modules import call_queue, devices, progress, shared

    with call_queue.queue_lock:
        shared.state.begin(job=job)
        if task:
            progress.start_task(task)
        try:
            yield
        finally:
            if task:
                progress.finish_task(task)
            shared.state.end()
            clear_interruption()
            shared.state.skipped = False
            shared.state.textinfo = None
            devices.torch_gc()


def interrupted() -> bool:
    """Whether the user pressed the WebUI's own Interrupt or Stop."""
    from modules import shared

    return bool(shared.state.interrupted or shared.state.stopping_generation)


def clear_interruption() -> None:
    """Forget Interrupt and Stop, so that what is sampled next is finished."""
    from modules import shared

    shared.state.interrupted = shared.state.stopping_generation = False


def show_progress(fraction: float, text: str, eta_s: float | None = None) -> None:
    """The WebUI's progress bar at fraction 0 ... 1, with its time left, which it makes of fraction and start."""
    from modules import shared

    state = shared.state
    known = fraction >= 0.01  # before that its time left would be far off
    state.job_count, state.job_no = (1000, round(fraction * 999)) if known else (0, 0)
    if eta_s is not None and 0 < fraction < 1:
        state.time_start = time.time() - eta_s * fraction / (1 - fraction)
    state.textinfo = text


def report(text: str) -> None:
    """Print a line and the traceback of the exception that is being handled into the WebUI's console."""
    from modules import errors

    errors.report(text, exc_info=True)


# ------------------------------------------------------------------------------------------------------- page and start


def on_start(
    *,
    before_page: Callable[[], None],
    tabs: Callable[[], list[tuple[Any, str, str]]],
    app: Callable[[Any], None],
    ends: Iterable[Callable[[], None]],
) -> None:
    """Have the WebUI call these, at its start and again after each Reload UI; this is said again then.

    before_page  before the page is built; tabs: [(gradio Blocks, title, id)]
    app          with the FastAPI application, a new one after each reload
    ends         before a reload, and when the extension's scripts are unloaded
    """
    from modules import script_callbacks

    script_callbacks.on_before_ui(before_page)
    script_callbacks.on_ui_tabs(tabs)
    script_callbacks.on_app_started(lambda demo, application: app(application))
    for end in ends:
        script_callbacks.on_before_reload(end)
        script_callbacks.on_script_unloaded(end)


def refresh_button(fields: Any, choices: Callable[[], list[str]], elem_id: str) -> None:
    """The WebUI's small refresh button beside a dropdown."""
    from modules.ui_common import create_refresh_button

    create_refresh_button(fields, lambda: None, lambda: {"choices": choices()}, elem_id)


def xyz_plots() -> list[ModuleType]:
    """The X/Y/Z plot's module, as the WebUI has loaded it; it has `axis_options` and `AxisOption`."""
    from modules import scripts

    names = ("xyz_grid.py", "scripts.xyz_grid")
    return [data.module for data in scripts.scripts_data if data.module.__name__ in names]
