"""Inside the sampler's loop: a script that is always visible in txt2img and img2img, and what it changes there.

The WebUI calls a script right before each pass of a generation (hires fix has two), when the pass has its sampler. Only
that sampler is changed, so nothing of ours is in place outside of its loop, whether it ends, is interrupted or fails.
Exceptions of scripts and of callbacks the WebUI reports and forgets, and would go on to make another picture than was
asked for; here they end the generation and reach the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spo.algorithm.diffusion import training_sigmas
from spo.rng import SeededDraws
from spo.webui.a1111.prompts import text_features


@dataclass(frozen=True)
class SamplerPass:
    """A pass that is about to begin.

    architecture      of the loaded checkpoint: "sd15", "sdxl", or "" for another (SD2, SD3)
    checkpoint_name   of its file, without ending; checkpoint_hash: may be ""
    sampler           the sampler's name on the page; ancestral: whether it is k-diffusion's Euler ancestral
    prompts, seeds    of the batch, styles put on
    text              gives the prompts' features, [B, D] on the CPU (`Host.text_features`)
    eta               noise of its steps, as the settings have it
    settings          what X/Y/Z axes of ours chose
    """

    architecture: str
    checkpoint_name: str
    checkpoint_hash: str
    sampler: str
    ancestral: bool
    prompts: Sequence[str]
    seeds: Sequence[int]
    text: Callable[[], Tensor]
    eta: float
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class LoopChange:
    """What is to change in a pass.

    shift     ([N, C, H, W] VE latents, [N] sigmas) -> what to add to the predictions of the clean latents
    function  a sampler function in place of the sampler's, see `OwnLoop`
    infotext  what the picture's infotext says of it; remark: a sentence for the user, under the picture
    """

    shift: Shift | None = None
    function: Callable[[OwnLoop], Tensor] | None = None
    infotext: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class OwnLoop:
    """What a sampler function of ours gets: k-diffusion's arguments, for the pass's own prompts.

    model     `model(x [B, C, H, W], sigma [B]) -> denoised`, guided; x [B, C, H, W] at sigmas[0]; sigmas [T + 1]
    callback  k-diffusion's; draws: candidate 0's noise is what the sampler itself would have drawn
    alphas_cumprod  [1000] the training schedule, on the CPU
    """

    model: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    sigmas: Tensor
    callback: Callable[[dict[str, Any]], None]
    draws: PassDraws
    alphas_cumprod: Tensor


Shift = Callable[[Tensor, Tensor], Tensor]  # see `LoopChange.shift`
ChangeOf = Callable[[SamplerPass, Sequence[Any]], "LoopChange | None"]  # see `script_class`


def _architecture(model: Any) -> str:
    if any(getattr(model, name, False) for name in ("is_sd2", "is_sd3")):
        return ""
    return "sdxl" if getattr(model, "is_sdxl", False) else "sd15"


def _alphas_cumprod(model: Any) -> Tensor:
    return model.alphas_cumprod  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Ways:
    """What WebUIs do each in their way.

    shifted         see `predictions_shifted`
    architecture    the WebUI's model -> "sd15", "sdxl", or "" for another
    alphas_cumprod  the WebUI's model -> [1000] its training schedule
    """

    shifted: Callable[[Shift], AbstractContextManager[None]]
    architecture: Callable[[Any], str] = _architecture
    alphas_cumprod: Callable[[Any], Tensor] = _alphas_cumprod


@dataclass(frozen=True)
class PassDraws:
    """Noise of candidates: of candidate 0 the WebUI's own, so that one candidate alone makes the ordinary picture."""

    rng: Any
    others: SeededDraws

    def noise(self, step: int, candidates: int, like: Tensor) -> Tensor:
        """[candidates, B, C, H, W]; see `algorithm.rollout.Draws`."""
        own = self.rng.next().to(like)[None]
        return own if candidates == 1 else torch.cat([own, self.others.noise(step, candidates, like)[1:]])

    def parents(self, step: int, candidates: int) -> Tensor:
        """Candidate 0 goes on, unless somebody chooses."""
        return torch.zeros(len(self.others.seeds), dtype=torch.int64)


def script_class(
    title: str,
    build: Callable[[bool], tuple[list[Any], list[tuple[Any, Any]]]],
    change_of: ChangeOf,
    other_ways: Ways | None = None,
) -> type:
    """A class of script that is always visible in txt2img and img2img, for a module that the WebUI reads scripts from.

    build      (whether for img2img) -> (fields, pairs of a field and its key in the infotext or a function of it)
    change_of  (the pass, the fields' values) -> what to change in it, None for nothing; what it raises ends the
               generation
    other_ways of a WebUI that does otherwise; None: A1111's
    """
    from modules import scripts

    ways = other_ways or Ways(predictions_shifted)

    class AlwaysVisible(scripts.Script):  # type: ignore[misc]
        def title(self) -> str:
            return title

        def show(self, is_img2img: bool) -> Any:
            return scripts.AlwaysVisible

        def ui(self, is_img2img: bool) -> list[Any]:
            fields, self.infotext_fields = build(is_img2img)
            self.paste_field_names = [key for _, key in self.infotext_fields if isinstance(key, str)]
            return fields

        def process_before_every_sampling(self, p: Any, *values: Any, c: Any = None, **_: Any) -> None:
            _prepare(p, c, values, change_of, ways)

    return AlwaysVisible


def _prepare(p: Any, conditioning: Any, values: Sequence[Any], change_of: ChangeOf, ways: Ways) -> None:
    """Put the change into the sampler of p's pass, in the place of what an earlier pass left in the same one.

    conditioning  of the batch's positive prompts, as the WebUI hands it to the sampler
    """
    sampler = p.sampler
    for name in ("launch_sampling", "func"):
        if getattr(vars(sampler).get(name), "_of_spo", False):
            former = getattr(vars(sampler)[name], "_former", None)
            if former is None:
                delattr(sampler, name)
            else:
                setattr(sampler, name, former)
    try:
        change = change_of(_pass_of(p, conditioning, ways.architecture(p.sd_model)), values)
    except Exception as error:
        _replace(sampler, "launch_sampling", _raising(error))
        return
    if change is None:
        return
    p.extra_generation_params.update(change.infotext)
    if change.remark:
        p.comment(change.remark)
    if change.function is not None:
        _replace(sampler, "func", _own_function(p, change.function, ways), sampler.func)
    if change.shift is not None:
        _replace(sampler, "launch_sampling", _shifted(sampler.launch_sampling, ways.shifted(change.shift)))


def _replace(sampler: Any, name: str, function: Any, former: Any = None) -> None:
    function._of_spo, function._former = True, former
    setattr(sampler, name, function)


def _raising(error: Exception) -> Callable[..., Any]:
    def launch_sampling(steps: int, func: Callable[[], Any]) -> Any:
        raise error

    return launch_sampling


def _shifted(launch: Callable[..., Any], shifting: AbstractContextManager[None]) -> Callable[..., Any]:
    def launch_sampling(steps: int, func: Callable[[], Any]) -> Any:
        with shifting:
            return launch(steps, func)

    return launch_sampling


def _own_function(p: Any, function: Callable[[OwnLoop], Tensor], ways: Ways) -> Callable[..., Tensor]:
    """A function of k-diffusion's signature; `eta` is in it for the WebUI to write its setting into the infotext."""

    def sample(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None,
        eta: float = 1.0,
    ) -> Tensor:  # fmt: skip
        def at_its_step(x: Tensor, sigma: Tensor) -> Tensor:
            # the CFG denoiser counts its calls as steps, which prompt editing goes by; candidates are one step together
            model.step = int((sigmas - sigma[0].to(sigmas)).abs().argmin())
            return model(x, sigma, **extra_args)  # as they are now: a refiner changes them on the way

        draws = PassDraws(p.rng, SeededDraws([_seed_of(p, seed) for seed in p.seeds[: len(x)]]))
        schedule = ways.alphas_cumprod(p.sd_model).float().cpu()
        return function(OwnLoop(at_its_step, x, sigmas, callback, draws, schedule))

    return sample


def _seed_of(p: Any, seed: int) -> int:
    """Another one in the second pass of hires fix, whose steps are counted from 0 again."""
    return int(seed) + (2**32 if _is_hires(p) else 0)


def _is_hires(p: Any) -> bool:
    return bool(getattr(p, "is_hr_pass", False))


def _pass_of(p: Any, conditioning: Any, architecture: str) -> SamplerPass:
    model, sampler = p.sd_model, p.sampler
    info = model.sd_checkpoint_info
    prompts = p.hr_prompts if _is_hires(p) and getattr(p, "hr_prompts", None) else p.prompts
    return SamplerPass(
        architecture=architecture,
        checkpoint_name=info.name_for_extra,
        checkpoint_hash=info.shorthash or "",
        sampler=sampler.config.name,
        ancestral=sampler.funcname == "sample_euler_ancestral",
        prompts=list(prompts),
        seeds=[int(seed) for seed in p.seeds],
        text=partial(text_features, conditioning),
        eta=float(_eta(p, sampler)),
        settings=getattr(p, "spo_taste", {}),
    )


def _eta(p: Any, sampler: Any) -> float:
    from modules import shared

    return p.eta if p.eta is not None else getattr(shared.opts, sampler.eta_option_field, sampler.eta_default)


class _Failed(BaseException):
    """Carries an exception of ours past the WebUI, which would report those of callbacks and go on."""


@contextmanager
def predictions_shifted(shift: Shift) -> Iterator[None]:
    """Inside, `shift` is added to every prediction of the clean latent, before guidance, masks and previews.

    To those of all prompts, positive and negative, alike: guidance is an affine combination of them, so the guided
    prediction moves by the same, whatever its scale, with AND, and where the negative prompt is left out. What `shift`
    raises comes out of this. Samplers of the DDIM kind work with the noise instead, and latents of unit variance.
    """
    from modules import script_callbacks

    latest: list[Any] = []  # the denoiser's arguments of the call that goes on

    def remember(arguments: Any) -> None:
        latest[:] = [arguments]

    def add(predicted: Any) -> None:
        try:
            (arguments,) = latest
            _add_shift(arguments, predicted.x, shift)
        except Exception as error:
            raise _Failed from error

    script_callbacks.on_cfg_denoiser(remember, name="spo-taste")
    script_callbacks.on_cfg_denoised(add, name="spo-taste")
    try:
        yield
    except _Failed as failed:
        assert failed.__cause__ is not None
        raise failed.__cause__ from None
    finally:
        script_callbacks.remove_callbacks_for_function(remember)
        script_callbacks.remove_callbacks_for_function(add)


def _add_shift(arguments: Any, outputs: Tensor, shift: Shift) -> None:
    """Change the network's outputs [rows, C, H, W] in place. The last rows are the negative prompt's, one an image."""
    uncond = arguments.text_uncond
    count = len(uncond["crossattn"] if isinstance(uncond, dict) else uncond)
    latents, levels = arguments.x[-count:], arguments.sigma[-count:]
    alphas = getattr(arguments.denoiser, "alphas", None)  # of the DDIM kind only, whose levels are timesteps
    if alphas is None:
        moved = shift(latents, levels.float())
    else:
        sigma = _sigma_of_timestep(levels, alphas)
        per_image = sigma[:, None, None, None].to(latents)
        moved = -shift(latents * (1 + per_image**2).sqrt(), sigma) / per_image
    same = (arguments.x[: len(outputs), None] == latents[None]).flatten(2).all(2)  # which image each row is of
    outputs += moved[same.float().argmax(1)].to(outputs.dtype)


def _sigma_of_timestep(timesteps: Tensor, alphas: Tensor) -> Tensor:
    """[N] noise levels of timesteps 0 ... 999, among which UniPC asks for some between whole ones."""
    logs = training_sigmas(alphas).log().cpu()
    place = timesteps.cpu().double().clamp(0, len(logs) - 1)
    below = place.floor().long().clamp(max=len(logs) - 2)
    return torch.lerp(logs[below], logs[below + 1], place - below).exp().float().to(timesteps.device)
