"""The script "SPO taste" of txt2img and img2img: pictures that follow a taste, without training.

Its fields, what they say in the infotext and take back from it, and what comes of them in the sampler's loop. Steering
works with every sampler; choosing needs steps that add noise, which it makes itself, as Euler ancestral does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from spo.algorithm.preference import PreferenceModel
from spo.errors import SpoError, nearest
from spo.preference.choose import MAX_CANDIDATES, sample_best
from spo.preference.load import BUNDLED, check_made_for, describe_preference, load
from spo.preference.steer import MAX_STRENGTH, steering
from spo.preference.taste.head import TasteFacts, TasteHead
from spo.webui import folders
from spo.webui.seam import webui

TITLE = "SPO taste"
STEER, CHOOSE = "Steer", "Choose"
WAYS = (STEER, CHOOSE)
_KEYS = {"model": "SPO taste", "how": "SPO taste mode", "strength": "SPO taste strength", "candidates": "SPO taste K"}


@dataclass(frozen=True)
class TasteRequest:
    """What the fields say, in their order; the API takes the same names.

    model       a name of `folders.preference_choices`
    how         "Steer" or "Choose", in any case
    strength    of steering, -`MAX_STRENGTH` to `MAX_STRENGTH`
    candidates  to choose from at each step
    """

    enabled: bool = False
    model: str = ""
    how: str = STEER
    strength: float = 1.0
    candidates: int = 4


def request_of(values: Sequence[Any], settings: Mapping[str, Any]) -> TasteRequest:
    """The request in the fields' values, or in one object in their place, as the API's users write it.

    values    one for each field of `TasteRequest`, as many as there are; or first of all a mapping, which enables
    settings  of X/Y/Z axes, which win, and enable; a model "None" disables

    Raises SpoError that names the value, when it cannot be used.
    """
    names = [item.name for item in fields(TasteRequest)]
    if values and isinstance(values[0], Mapping):
        given = {"enabled": True, **values[0]}
    else:
        given = dict(zip(names, values, strict=False))
    if settings:
        given |= {"enabled": settings.get("model") != "None", **settings}
    for name in given:
        if name not in names:
            raise SpoError(f'{TITLE} has no "{name}"{nearest(str(name), names)}; accepted are {", ".join(names)}.')
    if not given.get("enabled"):
        return TasteRequest()
    how = str(given.get("how", STEER)).capitalize()
    if how not in WAYS:
        raise SpoError(f'{TITLE}: how is "{given["how"]}"; accepted are {STEER} and {CHOOSE}.')
    strength = _number(given, "strength", -MAX_STRENGTH, MAX_STRENGTH)
    candidates = _number(given, "candidates", 2, MAX_CANDIDATES)
    return TasteRequest(True, str(given.get("model") or ""), how, strength, int(candidates))


def _number(given: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = given.get(name, getattr(TasteRequest, name))
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high or (name == "candidates" and number != int(number)):
        raise SpoError(f"{TITLE}: {name} is {value!r}; accepted are {low:g} to {high:g}.")
    return number


# ----------------------------------------------------------------------------------------------------- what comes of it


def change_of(sampler_pass: webui.SamplerPass, values: Sequence[Any]) -> webui.LoopChange | None:
    """What the fields change in a pass; None when they are off.

    Raises SpoError, so that there is no picture, for what cannot be done with this model, checkpoint or sampler.
    """
    request = request_of(values, sampler_pass.settings)
    if not request.enabled:
        _forget_model()
        return None
    name = request.model.strip()
    if not name:
        raise SpoError(f"{TITLE} is on without a model; choose one of models/SPO: vote and fit one in the SPO tab.")
    path = folders.preference_path(name)
    _check_checkpoint(name, path, sampler_pass)
    infotext = {_KEYS["model"]: name, _KEYS["how"]: request.how}
    if request.how == STEER:
        infotext[_KEYS["strength"]] = f"{request.strength:g}"
        model = _model(path)
        by = steering(model, request.strength, _text_for(model, sampler_pass))
        shift = by.shift if request.strength else None
        return webui.LoopChange(shift, infotext=infotext, remark=_remark(by.head.facts, sampler_pass))
    infotext[_KEYS["candidates"]] = str(request.candidates)
    if not sampler_pass.ancestral:
        raise SpoError(
            f"{TITLE}: {sampler_pass.sampler} has no independent noise in each step to choose from; take the sampler "
            "Euler a, or steer."
        )
    if sampler_pass.eta <= 0:
        raise SpoError(f"{TITLE}: the setting Eta is 0, so that Euler a adds no noise to choose from; set it above 0.")
    model = _model(path)
    facts = model.facts if isinstance(model, TasteHead) else TasteFacts()
    text = _text_for(model, sampler_pass)
    chosen = partial(_chosen, model, sampler_pass.prompts, text, request.candidates, sampler_pass.eta)
    return webui.LoopChange(function=chosen, infotext=infotext, remark=_remark(facts, sampler_pass))


def _text_for(model: PreferenceModel, sampler_pass: webui.SamplerPass) -> Tensor | None:
    """[B, D] the prompts' features, for a taste head that reads them; checked here, before the picture is begun."""
    if not isinstance(model, TasteHead) or model.prompt_reader is None:
        return None
    text = sampler_pass.text()
    model.prompt_codes(text, webui.device())
    return text


def _chosen(
    model: PreferenceModel,
    prompts: Sequence[str],
    text: Tensor | None,
    candidates: int,
    eta: float,
    loop: webui.OwnLoop,
) -> Tensor:
    decode = partial(webui.decode, webui.loaded_checkpoint()) if model.needs_pixels else None
    return sample_best(
        loop.model, loop.x, loop.sigmas, callback=loop.callback,
        preference=model, prompts=prompts, candidates=candidates, draws=loop.draws,
        alphas_cumprod=loop.alphas_cumprod, eta=eta, decode=decode, text=text,
    )  # fmt: skip


def _check_checkpoint(name: str, path: str, sampler_pass: webui.SamplerPass) -> None:
    """SpoError for a model made for another kind of checkpoint: its scores of these latents would mean nothing."""
    if not sampler_pass.architecture:
        raise SpoError(f"{TITLE} works with SD1.5 and SDXL; {sampler_pass.checkpoint_name} is neither. Switch it off.")
    made_for = describe_preference(path).architecture
    if made_for not in ("any", sampler_pass.architecture):
        raise SpoError(
            f'{TITLE}: "{name}" was made for {made_for}, and {sampler_pass.checkpoint_name} is '
            f"{sampler_pass.architecture}; choose another model, or load the checkpoint that it was made for."
        )
    check_made_for(name, sampler_pass.checkpoint_name)


def _remark(facts: TasteFacts, sampler_pass: webui.SamplerPass) -> str:
    """A sentence about a head that was fitted to another checkpoint's pictures: it may do, as latents are alike."""
    here, there = sampler_pass.checkpoint_name, Path(facts.checkpoint_name.removesuffix(".safetensors")).name
    hashes = [one for one in (sampler_pass.checkpoint_hash, facts.checkpoint_hash) if one]
    length = min(map(len, hashes), default=0)
    same = hashes[0][:length] == hashes[1][:length] if len(hashes) == 2 else here == there
    if same or not there:
        return ""
    return f"{TITLE}: {facts.name} was fitted to pictures of {there}, not of {here}; look whether it holds here."


# The one loaded model: path, time of its file and device; kept while the script is on, given back when it is off
_loaded: dict[tuple[str, float, str], PreferenceModel] = {}


def _model(path: str) -> PreferenceModel:
    """The model in a file or of a bundled name, on the WebUI's device."""
    place = webui.device()
    changed = Path(path).stat().st_mtime if path != BUNDLED else 0.0
    key = (path, changed, str(place))
    if key not in _loaded:
        _forget_model()
        _loaded[key] = load(path, device=place, architecture=describe_preference(path).architecture)
    return _loaded[key]


def _forget_model() -> None:
    _loaded.clear()


# ---------------------------------------------------------------------------------------------------------- the fields


def script() -> type:
    """The class that the WebUI looks for in a script's file."""
    return webui.script_class(TITLE, build, change_of)


def build(is_img2img: bool) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """The script's fields, in the order of `TasteRequest`, and where they find themselves in an infotext."""
    import gradio as gr

    tab = "img2img" if is_img2img else "txt2img"
    choices = choices_of_models()
    with gr.Accordion(TITLE, open=False, elem_id=f"spo_taste_{tab}"):
        with gr.Row():
            enabled = gr.Checkbox(False, label="Follow a taste", elem_id=f"spo_taste_{tab}_enabled")
            model = gr.Dropdown(
                choices, value=next(iter(choices), None), label="Taste", elem_id=f"spo_taste_{tab}_model"
            )
            webui.refresh_button(model, choices_of_models, f"spo_taste_{tab}_refresh")
        how = gr.Radio(
            list(WAYS), value=STEER, label="How it is followed",
            info="Steer: each step is bent a little, with any sampler. Choose: the best of some draws, with Euler a.",
            elem_id=f"spo_taste_{tab}_how",
        )  # fmt: skip
        with gr.Row():
            strength = gr.Slider(
                -MAX_STRENGTH, MAX_STRENGTH, 1.0, step=0.05, label="Strength of the taste",
                info="Below 0: away from it.", elem_id=f"spo_taste_{tab}_strength",
            )  # fmt: skip
            candidates = gr.Slider(
                2, MAX_CANDIDATES, 4, step=1, label="Candidates to choose from", elem_id=f"spo_taste_{tab}_candidates"
            )
    pasted = [
        (enabled, lambda infotext: _KEYS["model"] in infotext),
        (model, _KEYS["model"]),
        (how, _KEYS["how"]),
        (strength, _KEYS["strength"]),
        (candidates, _KEYS["candidates"]),
    ]
    return [enabled, model, how, strength, candidates], pasted


def choices_of_models() -> list[str]:
    """Models to follow: taste heads first, then others, of both the newest first; the demo's last."""
    models = sorted(
        folders.preference_models(), key=lambda info: (info.kind != "taste head", -info.path.stat().st_mtime)
    )
    return [*(info.path.name for info in models), BUNDLED]
