"""X/Y/Z plot axes: which SPO LoRA, which of its stages, at what weight; and which taste is followed, how, how far.

An axis of LoRAs only rewrites the prompt's `<lora:...>` of those made by SPO; others stay. The plot applies its axes
one after another to a copy of the processing object, so each leaves there what it chose, and their order does not
matter.
An axis of taste switches the script "SPO taste" on for its cells; what no axis says is as in the script's fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spo.errors import SpoError, nearest
from spo.runs.layout import split_stage
from spo.webui import taste
from spo.webui.seam import webui

LORA, STAGE, WEIGHT = "[SPO] LoRA", "[SPO] stage", "[SPO] weight"
TASTE = {  # field of the taste's request -> label
    "model": "[SPO] taste",
    "how": "[SPO] taste mode",
    "strength": "[SPO] taste strength",
    "candidates": "[SPO] taste K",
}
NONE = "None"
MAX_WEIGHT = 10.0
_TAG = re.compile(r"\s*<lora:([^:>]+)(?::([^>]*))?>")


def add_axes() -> None:
    """Put our axes into the X/Y/Z plot, once, also after Reload UI. Call it before the page is built."""
    plot: Any
    for plot in webui.xyz_plots():
        known = {option.label for option in plot.axis_options}
        for option in _options(plot.AxisOption):
            if option.label not in known:
                plot.axis_options.append(option)


def _options(axis_option: Callable[..., Any]) -> Iterator[Any]:
    """cost: the WebUI takes time to put other LoRAs in place, so these are its outer loops."""
    yield axis_option(
        LORA, str, _apply_lora, format_value=_legend, confirm=_confirm_lora, cost=0.3, choices=lora_choices
    )
    yield axis_option(
        STAGE, str, _apply_stage, format_value=_legend, confirm=_confirm_stage, cost=0.3, choices=stage_choices
    )
    yield axis_option(
        WEIGHT, float, _apply_weight, format_value=lambda p, option, x: f"weight {x:g}", confirm=_confirm_weight,
        cost=0.2,
    )  # fmt: skip
    yield axis_option(
        TASTE["model"], str, _apply_taste("model"), format_value=_taste_name, confirm=_confirm_taste("model"), cost=0.1,
        choices=lambda: [NONE, *taste.choices_of_models()],
    )  # fmt: skip
    yield axis_option(
        TASTE["how"], str, _apply_taste("how"), format_value=lambda p, option, how: how,
        confirm=_confirm_taste("how"), choices=lambda: list(taste.WAYS),
    )  # fmt: skip
    for name, number in (("strength", float), ("candidates", int)):
        yield axis_option(
            TASTE[name], number, _apply_taste(name), format_value=_taste_number, confirm=_confirm_taste(name)
        )


# ------------------------------------------------------------------------------------------------------------ choices


def _made_by_spo() -> list[str]:
    """Names, as prompts call them, of the LoRAs that SPO made; the WebUI has their metadata at hand."""
    loras = webui.known_loras() or {}
    return sorted((name for name, lora in loras.items() if lora.metadata.get("spo_run_id")), key=str.casefold)


def lora_choices() -> list[str]:
    """ "None" and the finished LoRAs."""
    return [NONE, *(name for name in _made_by_spo() if split_stage(name)[1] is None)]


def stage_choices() -> list[str]:
    """Run by run the saved stages, then the finished LoRA."""

    def place(name: str) -> tuple[str, float]:
        run, step = split_stage(name)
        return run.casefold(), float("inf") if step is None else step

    return sorted(_made_by_spo(), key=place)


def _legend(p: Any, option: Any, name: str) -> str:
    run, step = split_stage(name)
    return f"{run} step {step}" if step is not None else "no SPO LoRA" if name == NONE else name


# --------------------------------------------------------------------------------------------------------- confirming


def _confirm_lora(p: Any, names: Sequence[str]) -> None:
    _confirm_names(LORA, names, [NONE, *_made_by_spo()])


def _confirm_stage(p: Any, names: Sequence[str]) -> None:
    _confirm_names(STAGE, names, _made_by_spo())


def _confirm_names(label: str, names: Sequence[str], known: Sequence[str]) -> None:
    if not names:
        raise SpoError(f"{label} has no value; choose one or more.")
    for name in names:
        if name not in known:
            raise SpoError(f'{label}: there is no LoRA made by SPO that is called "{name}"{nearest(name, known)}.')


def _confirm_weight(p: Any, weights: Sequence[float]) -> None:
    if not weights:
        raise SpoError(f"{WEIGHT} has no value; give one or more, such as 0, 0.5, 1.")
    for weight in weights:
        if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
            raise SpoError(f"{WEIGHT}: {weight:g} cannot be used; give numbers from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}.")
    ours = set(_made_by_spo())
    if _axes_of(p).isdisjoint((LORA, STAGE)) and not all(_names(text) & ours for text in _texts(p.prompt)):
        raise SpoError(f"{WEIGHT} needs a LoRA made by SPO: name one in the prompt, or add the axis {LORA} or {STAGE}.")


def _texts(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt


def _names(prompt: str) -> set[str]:
    return {tag[1] for tag in _TAG.finditer(prompt)}


def _axes_of(p: Any) -> set[str]:
    """Labels of all axes of the plot that p is for; `confirm` is told of its own alone."""
    arguments, runner = getattr(p, "script_args", None), getattr(p, "scripts", None)
    if not arguments or not isinstance(arguments[0], int) or runner is None or arguments[0] < 1:
        return set()
    script = runner.selectable_scripts[arguments[0] - 1]
    options = getattr(script, "current_axis_options", [])
    chosen = arguments[script.args_from : script.args_to][0:9:3]  # type, values, choices of each axis
    return {options[index].label for index in chosen if isinstance(index, int) and 0 <= index < len(options)}


# ----------------------------------------------------------------------------------------------------------- applying


def _apply_lora(p: Any, name: str, _: Sequence[str]) -> None:
    _choose(p, LORA, name)


def _apply_stage(p: Any, name: str, _: Sequence[str]) -> None:
    _choose(p, STAGE, name)


def _choose(p: Any, label: str, name: str) -> None:
    if getattr(p, "spo_lora", None) is not None:
        raise SpoError(f"{LORA} and {STAGE} both choose the file; use one of them, with {WEIGHT} if you like.")
    p.spo_lora = name
    _rewrite(p)


def _apply_weight(p: Any, weight: float, _: Sequence[float]) -> None:
    p.spo_weight = weight
    _rewrite(p)


def _rewrite(p: Any) -> None:
    """Make p's prompts say what the axes so far chose."""
    chosen, weight = getattr(p, "spo_lora", None), getattr(p, "spo_weight", None)
    ours = set(_made_by_spo())

    def rewritten(text: str) -> str:
        return with_lora(text, ours, chosen, weight)

    p.prompt = rewritten(p.prompt) if isinstance(p.prompt, str) else [rewritten(text) for text in p.prompt]
    if getattr(p, "hr_prompt", ""):  # of the hires pass, when it has one of its own
        p.hr_prompt = rewritten(p.hr_prompt) if isinstance(p.hr_prompt, str) else [*map(rewritten, p.hr_prompt)]


def with_lora(prompt: str, ours: set[str], chosen: str | None, weight: float | None) -> str:
    """The prompt with the LoRAs of `ours` in it changed.

    chosen  None: those that are there stay; "None": they go; a name: it takes their place, or stands at the end
    weight  None: as in the prompt, 1 where it names none
    """
    mine = [tag for tag in _TAG.finditer(prompt) if tag[1] in ours]

    def tag_text(name: str, arguments: str | None) -> str:
        return f"<lora:{name}:{(arguments or '1') if weight is None else format(weight, 'g')}>"

    if chosen is None:

        def weighed(tag: re.Match[str]) -> str:
            space = tag[0][: tag[0].index("<")]
            return space + tag_text(tag[1], tag[2]) if tag[1] in ours else tag[0]

        return _TAG.sub(weighed, prompt)
    rest = _TAG.sub(lambda tag: "" if tag[1] in ours else tag[0], prompt)
    if chosen == NONE:
        return rest.strip() if mine else rest
    return f"{rest.rstrip()} {tag_text(chosen, mine[0][2] if mine else None)}".lstrip()


# ---------------------------------------------------------------------------------------------------------------- taste


def _apply_taste(name: str) -> Callable[[Any, Any, Sequence[Any]], None]:
    def apply(p: Any, value: Any, _: Sequence[Any]) -> None:
        p.spo_taste = {**getattr(p, "spo_taste", {}), name: value}

    return apply


def _confirm_taste(name: str) -> Callable[[Any, Sequence[Any]], None]:
    def confirm(p: Any, values: Sequence[Any]) -> None:
        if not values:
            raise SpoError(f"{TASTE[name]} has no value; give one or more.")
        for value in values:
            taste.request_of([{name: value}], {})
            if name == "model":
                known = [NONE, *taste.choices_of_models()]
                if value not in known:
                    raise SpoError(f'{TASTE[name]}: there is no "{value}" in models/SPO{nearest(value, known)}.')

    return confirm


def _taste_name(p: Any, option: Any, name: str) -> str:
    return "no taste" if name == NONE else name.removesuffix(".safetensors")


def _taste_number(p: Any, option: Any, value: float) -> str:
    return f"{option.label.removeprefix('[SPO] ')} {value:g}"
