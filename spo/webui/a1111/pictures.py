"""Pictures by the WebUI's own processing, by its samplers or by ours, and where it keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from torch import Tensor

from spo.webui.a1111.prompts import EncodedPrompts

if TYPE_CHECKING:
    from PIL.Image import Image


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
    encoded   the request's prompts, so that nothing is encoded; None: the WebUI encodes
    """

    function: Callable[..., Tensor]
    sigmas: Tensor
    noise: Tensor
    encoded: EncodedPrompts | None = None


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


def txt2img(
    request: PictureRequest,
    sampling: OwnSampling | None = None,
    *,
    prepare: Callable[[Any], None] = lambda p: None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Pictures:
    """The WebUI's own processing, with styles, scripts and saving left out; nothing comes on its disk.

    sampling           up to the latents only, by our own sampler function: nothing is decoded, and settings that the
                       training step does not have are off (token merging, tiling, NGMS, Skip Early CFG, face
                       restoration)
    prepare, settings  for other WebUIs: what to change of the processing; settings that hold for it alone
    """
    from modules import processing, sd_samplers_common, sd_samplers_kdiffusion, shared

    class Processing(processing.StableDiffusionProcessingTxt2Img):
        latents: Tensor | None = None

        def setup_conds(self) -> None:
            if sampling is None or sampling.encoded is None:
                super().setup_conds()
            else:
                self.c, self.uc = sampling.encoded.batch(request.prompts, shared.device)

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
            return sampling.sigmas  # whatever the settings say of the last but one

        def launch_sampling(self, steps: int, func: Callable[[], Any]) -> Any:
            def guided() -> Any:
                # the share of steps is not below any setting then: no "Skip Early CFG", which training does not have
                self.model_wrap_cfg.total_steps = math.nan
                return func()

            return super().launch_sampling(steps, guided)

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
        do_not_save_samples=True,
        do_not_save_grid=True,
        override_settings=dict(settings),
        **({} if sampling is None else {"restore_faces": False, "tiling": False, "s_min_uncond": 0.0}),
    )
    p.scheduler = "Automatic"  # not a field of every fork's
    prepare(p)
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
    """The CFG denoiser's arguments for `count` candidates of every image, candidate-major, in one call of it."""
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

    hidden = set() if hidden_too else sd_samplers.samplers_hidden  # Forge classic has no function of those it shows
    return [sampler.name for sampler in sd_samplers.all_samplers if sampler.name not in hidden]


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


def link_to(file: Path) -> str:
    """The address under which the WebUI's page serves a file of its folders; "" where it does not."""
    from modules import shared

    path, served = file.resolve(), [Path(place).resolve() for place in shared.cmd_opts.gradio_allowed_path]
    return f"file={quote(path.as_posix())}" if any(path.is_relative_to(place) for place in served) else ""


def prompt_of_picture(picture: Image) -> str:
    """The prompt in a picture's infotext; "" without one."""
    from modules import images, infotext_utils

    infotext, _ = images.read_info_from_image(picture)
    return str(infotext_utils.parse_generation_parameters(infotext).get("Prompt", "")) if infotext else ""
