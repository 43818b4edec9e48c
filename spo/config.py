"""The configuration: one frozen tree for the command line, the tab, the API and the metadata of the file.

Outside, a configuration is flat: every setting has one name, the same as a flag, a key of a `--config` file, a key of
the API and a key of NAME.spo.json. Inside, it is a tree of small records. Defaults that depend on the architecture
come from the paper's table of settings (`PRESETS`); what the user gives wins over the preset, and that over defaults.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from spo.errors import SpoError, nearest


def _setting(default: Any, text: str, *choices: str, low: float | None = None, high: float | None = None) -> Any:
    factory = {"default_factory": lambda: default} if isinstance(default, list | tuple) else {"default": default}
    return field(**factory, metadata={"help": text, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class ModelConfig:
    checkpoint: str = _setting("", "Stable Diffusion checkpoint (SD1.5 or SDXL), a file or a diffusers folder")
    vae: str = _setting("", "VAE file to use instead of the checkpoint's own")
    prediction_type: str = _setting("auto", "what the network predicts", "auto", "epsilon", "v_prediction")
    clip_skip: int = _setting(
        1, "take the text encoder's output this many layers before the end (SD1.5)", low=1, high=12
    )
    precision: str = _setting(
        "auto",
        "of the frozen network; auto: float16 on a GPU, float32 on a CPU",
        "auto",
        "float32",
        "float16",
        "bfloat16",
    )
    weight_storage: str = _setting(
        "precision",
        "of the frozen network's weights; float8 halves their memory, and pictures differ a little",
        "precision",
        "float8",
    )
    vae_precision: str = _setting(
        "auto",
        "of the VAE; auto on a GPU: half precision that a trial picture survives, float32 when a picture is not finite",
        "auto",
        "float32",
        "float16",
        "bfloat16",
    )
    vae_tiles: bool = _setting(
        False, "decode large pictures in tiles: less memory, faint seams; off: when memory runs out"
    )
    taesd: str = _setting("", "TAESD decoder to decode with in the VAE's place: faster, a little less exact")
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1, mps ...")
    gradient_checkpointing: bool = _setting(False, "less memory in training for about a third more time")
    rest_on_cpu: bool = _setting(
        False, "the preference model waits in main memory and comes to the GPU for a verdict only: less of its memory"
    )
    compile: bool = _setting(False, "run the network through torch.compile: minutes to begin with, faster afterwards")


@dataclass(frozen=True)
class PromptConfig:
    prompts: str = _setting(
        "", "prompts to train on: .txt (one a line), .json, .jsonl or .csv (caption, prompt or text)"
    )
    negative_prompt: str = _setting("", "negative prompt, in sampling and in training")
    width: int = _setting(
        0, "picture width in pixels, a multiple of 8; 0: 512 for SD1.5, 1024 for SDXL", low=0, high=4096
    )
    height: int = _setting(0, "picture height in pixels, likewise", low=0, high=4096)


@dataclass(frozen=True)
class RolloutConfig:
    sampling_steps: int = _setting(20, "denoising steps", low=1, high=500)
    sigmas: str = _setting(
        "ddim", "noise levels: ddim (the paper's), karras, exponential, uniform, or falling numbers a,b,c"
    )
    eta: float = _setting(1.0, "fresh noise at each step, 1 in the paper", low=0.01, high=1)
    guidance_scale: float = _setting(5.0, "CFG scale", low=1, high=50)
    candidates: int = _setting(4, "candidates in a pool (K)", low=2, high=64)
    inner_steps: int = _setting(0, "ordinary steps of each candidate before its verdict", low=0, high=50)
    divert_start_step: int = _setting(4, "first step that draws a pool", low=0, high=499)
    timestep_min: int = _setting(0, "draw pools only from this timestep", low=0, high=1000)
    timestep_max: int = _setting(1000, "... to this one", low=0, high=1000)
    threshold: float = _setting(
        0.3, "keep a pair when best and worst differ by more, as softmax probabilities", low=0, high=1
    )
    threshold_noisiest: float = _setting(
        0.0,
        "threshold of the step with the most noise, linear in the noise between; 0: one for all",
        low=0,
        high=1,
    )
    rollout_average: float = _setting(
        0.0,
        "decay of a moving average of the LoRA that pools are sampled by; 0: by the LoRA itself",
        low=0,
        high=0.9999,
    )
    teaching_share: float = _setting(
        0.0,
        "draw pools only between steps that keep this share of the best step's pairs, learnt on the way; 0: everywhere",
        low=0,
        high=1,
    )
    prompts_per_call: int = _setting(10, "pictures sampled at a time, of a rollout's; 0: all", low=0, high=4096)
    candidates_per_call: int = _setting(0, "candidates of a picture in one network call; 0: all", low=0, high=64)
    decode_batch: int = _setting(4, "latents decoded at a time", low=1, high=256)


@dataclass(frozen=True)
class PreferenceConfig:
    preference: str = _setting(
        "", "preference model: a file (docs/preference_models.md), a mix 0.7*A + 0.3*B, or demo for the demo checkpoint"
    )
    preference_precision: str = _setting(
        "auto",
        "its precision; auto: float16 on a GPU, float32 on a CPU",
        "auto",
        "float32",
        "float16",
        "bfloat16",
    )
    live_votes: str = _setting(
        "",
        "the folder of votes (in the tab: their name) that the taste head is refitted to while training, and for "
        "which the run makes pictures; none: the head stays as it is",
    )
    pairs: str = _setting(
        "", "with method dpo: a folder of labelled pairs or of votes, or parquet files; none: made from the checkpoint"
    )
    pairs_per_prompt: int = _setting(
        1, "with method dpo: so many pairs are made of each prompt, where none are given", low=1, high=4096
    )
    small_decode: bool = _setting(
        False, "decode candidates only as large as the preference model looks; says how well that agrees"
    )


@dataclass(frozen=True)
class LossConfig:
    method: str = _setting(
        "spo",
        "pairs of every denoising step (spo), Diffusion-DPO on pairs of finished pictures (dpo), or what the taste "
        "slider does with a taste head, learnt by the LoRA (steer)",
        "spo",
        "dpo",
        "steer",
    )
    steer_strength: float = _setting(1.0, "how far method steer follows the taste, as the taste slider", low=-4, high=4)
    dpo_beta: float = _setting(2000.0, "strength of the preference loss of method dpo", low=1e-6, high=1e6)
    beta: float = _setting(10.0, "strength of the preference loss", low=1e-6, high=1e6)
    step_weight: str = _setting(
        "paper",
        "what a step's pairs weigh: paper, gradspo (more in early steps) or equal",
        "paper",
        "gradspo",
        "equal",
    )
    winner_preserving: float = _setting(
        0.0,
        "scale the worst's gradient down where it would leave less than this share of the best's gain; 0: off",
        low=0,
        high=1,
    )
    ratio_clamp: float = _setting(0.1, "clamp the density ratios to 1 +- this", low=1e-6, high=0.999)
    train_guidance: bool = _setting(True, "classifier-free guidance in the training step, too; never with method dpo")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = _setting(4, "LoRA rank", low=1, high=1024)
    alpha: float = _setting(0.0, "LoRA alpha; 0: the rank", low=0, high=4096)
    modules: tuple[str, ...] = _setting(
        ("attention",), "kinds of modules to train: attention, feed-forward, convolution"
    )
    start_from: str = _setting("", "LoRA file to go on from")
    reference: str = _setting(
        "start", "with start_from: compare with the start, or with the bare checkpoint", "start", "base"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    epochs: int = _setting(10, "passes over the prompts; ignored when steps is given", low=1, high=100_000)
    steps: int = _setting(0, "optimizer updates; 0: by epochs", low=0, high=100_000_000)
    prompts_per_batch: int = _setting(40, "pictures of one rollout", low=1, high=4096)
    pairs_per_update: int = _setting(10, "pairs of one gradient", low=1, high=4096)
    pairs_per_call: int = _setting(0, "pairs in one network call; 0: all of an update", low=0, high=4096)
    accumulation: int = _setting(4, "gradients averaged for one optimizer update", low=1, high=4096)
    carry_pairs: bool = _setting(True, "pairs that are too few for an update wait for the next rollout's")
    optimizer: str = _setting("adamw", "adamw8bit needs bitsandbytes", "adamw", "adamw8bit")
    learning_rate: float = _setting(6e-5, "peak learning rate", low=0, high=10)
    schedule: str = _setting("constant", "of the learning rate", "constant", "cosine", "linear")
    warmup_steps: int = _setting(0, "updates over which the learning rate rises", low=0, high=1_000_000)
    beta1: float = _setting(0.9, "AdamW", low=0, high=0.9999)
    beta2: float = _setting(0.999, "AdamW", low=0, high=0.999999)
    epsilon: float = _setting(1e-8, "AdamW", low=0, high=1)
    weight_decay: float = _setting(1e-4, "AdamW", low=0, high=10)
    clip_norm: float = _setting(0.0, "clip the gradient's norm; 0: never", low=0, high=1e6)


@dataclass(frozen=True)
class ValidationConfig:
    judge: str = _setting(
        "auto",
        "preference model that training does not follow, which says what stage is the best: as for preference, "
        "demo-judge, or none; auto: another one that lies beside the preference model",
    )
    adherence: str = _setting(
        "auto", "model that says how well pictures show their prompts: likewise, demo-adherence, or none"
    )
    validate_every: int = _setting(
        50, "let them judge pictures of fixed prompts and seeds every so many updates; 0: never", low=0
    )
    validate_prompts: tuple[str, ...] = _setting((), "prompts of these pictures; none: some of training's")
    validate_count: int = _setting(
        16, "how many of training's prompts, spread over them, where validate_prompts names none", low=1
    )
    validate_pictures: int = _setting(2, "pictures of each of these prompts", low=2, high=64)
    patience: int = _setting(
        5, "end when so many of these checks in a row gave no better stage, whatever length is set; 0: never", low=0
    )
    on_decline: str = _setting(
        "warn",
        "when pictures get worse by judge, adherence or diversity, or the clamped share climbs",
        "ignore",
        "warn",
        "stop",
    )


@dataclass(frozen=True)
class RunConfig:
    output: str = _setting("", "the LoRA file to write, NAME.safetensors")
    run_folder: str = _setting("", "folder for the run's state, metrics and samples; none: NAME.spo beside the LoRA")
    seed: int = _setting(0, "everything random follows from it", low=0, high=2**63 - 1)
    save_every: int = _setting(
        100, "save the state and a stage of the LoRA every so many updates; 0: only at the end", low=0
    )
    keep_last: int = _setting(3, "keep so many stages of the LoRA; 0: all", low=0)
    sample_every: int = _setting(0, "sample pictures every so many updates; 0: never", low=0)
    sample_prompts: tuple[str, ...] = _setting((), "prompts of the samples; none: the first four of training")
    sample_seed: int = _setting(1, "seed of the first sample, fixed", low=0, high=2**63 - 1)
    save_precision: str = _setting("float16", "of the LoRA file", "float16", "bfloat16", "float32")
    replace: bool = _setting(False, "replace an existing LoRA file and its run")
    allow_other_preference: bool = _setting(False, "resume with a preference model other than the run's own")


@dataclass(frozen=True)
class Config:
    """The whole tree. Build it with `build_config`, which validates."""

    model: ModelConfig
    prompt: PromptConfig
    rollout: RolloutConfig
    preference: PreferenceConfig
    loss: LossConfig
    lora: LoraConfig
    optimizer: OptimizerConfig
    validation: ValidationConfig
    run: RunConfig

    def flat(self) -> dict[str, Any]:
        """name -> value of every setting, tuples as lists: what JSON holds."""
        values: dict[str, Any] = {}
        for section in dataclasses.fields(self):
            values.update(dataclasses.asdict(getattr(self, section.name)))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class Setting:
    """One setting as interfaces show it. kind: str, int, float, bool or list (of str)."""

    name: str
    section: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None


# Architecture -> the settings of the published runs; those of SD1.5 are the defaults above. Both ran on 4 GPUs, whose
# rollouts and gradients stand here one after the other: 40 prompts a rollout and 4 gradients of 10 pairs an update for
# SD1.5, 8 prompts and 2 x 4 gradients of 2 pairs for SDXL.
PRESETS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sdxl": {
        "candidates": 2,
        "inner_steps": 3,
        "threshold": 0.4,
        "rank": 64,
        "learning_rate": 1e-5,
        "prompts_per_batch": 8,
        "prompts_per_call": 2,
        "pairs_per_update": 2,
        "accumulation": 8,
        "dpo_beta": 5000.0,
    },
}
NATIVE_SIZE_PX = {"sd15": 512, "sdxl": 1024}


@cache
def settings() -> dict[str, Setting]:
    """Every setting by name, in order."""
    by_name: dict[str, Setting] = {}
    for section, record in typing.get_type_hints(Config).items():
        hints = typing.get_type_hints(record)
        for item in dataclasses.fields(record):
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            hint = hints[item.name]
            kind = list if isinstance(hint, types.GenericAlias) or typing.get_origin(hint) is tuple else hint
            assert item.name not in by_name, f"two settings are called {item.name}"
            by_name[item.name] = Setting(item.name, section, kind, default, **item.metadata)
    return by_name


def build_config(values: Mapping[str, Any], architecture: str = "sd15") -> Config:
    """A validated configuration from flat values; what is missing comes from the architecture's preset and defaults.

    Raises SpoError for an unknown name (naming the nearest), a value of the wrong kind or out of range.
    """
    known = settings()
    for name in values:
        if name not in known:
            raise SpoError(f'setting "{name}" is not known{nearest(name, known)}.')
    if architecture not in PRESETS:
        raise SpoError(f'architecture "{architecture}" is not known; {" and ".join(PRESETS)} are.')
    size = NATIVE_SIZE_PX[architecture]
    merged = {**PRESETS[architecture], **values}
    checked = {name: _checked(known[name], value) for name, value in merged.items()}
    for side in ("width", "height"):
        checked[side] = checked.get(side) or size
        if checked[side] % 8 or checked[side] < 64:
            raise SpoError(f"{side} is {checked[side]} pixels; accepted are multiples of 8 from 64.")
    if checked.get("method") == "dpo":
        checked["train_guidance"] = False  # as published: its loss is of the network's own prediction
    if checked.get("method") == "steer":
        checked |= {"threshold": 0.0, "inner_steps": 0}  # it learns at every latent, whatever the verdict on its pool
    checked["alpha"] = checked.get("alpha") or float(checked.get("rank", known["rank"].default))
    sections = {}
    for section, record in typing.get_type_hints(Config).items():
        names = {item.name for item in dataclasses.fields(record)}
        sections[section] = record(**{name: value for name, value in checked.items() if name in names})
    config = Config(**sections)
    if config.rollout.timestep_min > config.rollout.timestep_max:
        raise SpoError(
            f"timestep_min {config.rollout.timestep_min} is above timestep_max {config.rollout.timestep_max}, "
            "so that no pool would be drawn; give them in order."
        )
    return config


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Flat values from a .json, .yaml or .yml file (a NAME.spo.json of an earlier run, for instance).

    Raises SpoError when it cannot be read, is not a mapping, or has another ending.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            values = json.loads(text)
        elif path.suffix.lower() in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text)
        else:
            raise SpoError(f'configuration file "{path}" must end in .json, .yaml or .yml.')
    except OSError as error:
        raise SpoError(f'configuration file "{path}" cannot be read: {error.strerror or error}.') from error
    except (ValueError, UnicodeDecodeError) as error:
        raise SpoError(f'configuration file "{path}" is not valid {path.suffix[1:].upper()}: {error}.') from error
    except Exception as error:  # yaml's own errors, whose classes need yaml
        if type(error).__module__.startswith("yaml"):
            raise SpoError(f'configuration file "{path}" is not valid YAML: {error}.') from error
        raise
    if not isinstance(values, dict):
        raise SpoError(
            f'configuration file "{path}" holds a {type(values).__name__}; it must hold "setting: value" pairs.'
        )
    return values


def _checked(setting: Setting, value: Any) -> Any:
    """`value` in the setting's type, or SpoError saying name, value and what is accepted."""
    converted = _converted(setting, value)
    if setting.choices:
        for one in converted if isinstance(converted, tuple) else (converted,):
            if one not in setting.choices:
                accepted = ", ".join(setting.choices) + nearest(str(one), setting.choices)
                raise SpoError(f'{setting.name} is "{one}"; accepted are {accepted}.')
    if setting.kind in (int, float):
        low, high = setting.low, setting.high
        if not (low is None or converted >= low) or not (high is None or converted <= high):
            accepted = f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
            raise SpoError(f"{setting.name} is {converted}; accepted is {accepted}.")
    return converted


def _converted(setting: Setting, value: Any) -> Any:
    wrong = SpoError(f"{setting.name} is {value!r}; it must be {_KIND_NAMES[setting.kind]}.")
    if setting.kind is list:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(one, str) for one in values):
            raise wrong
        return tuple(values)
    if setting.kind is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if setting.kind is str:
        if isinstance(value, list | tuple) and setting.name == "sigmas":
            return ",".join(str(one) for one in value)
        if not isinstance(value, str):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = setting.kind(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if setting.kind is int and isinstance(value, float) and number != value:
        raise wrong
    return number


_KIND_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list of texts"}
