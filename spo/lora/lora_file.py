"""LoRA files: kohya's names and metadata, which the WebUI, ComfyUI and diffusers all read. Write, verify, read, match.

A file holds, for each module, `<name>.lora_down.weight`, `<name>.lora_up.weight` and `<name>.alpha`, and nothing else.
A module's weight changes by `alpha / rank * up @ down`.

Deliberate differences from kohya's files: `alpha` is always float32 (half precision would round it), and
`ss_sd_model_hash` is the WebUI's short sha256 of the checkpoint, not the older hash of a piece of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn

from spo import __version__
from spo.checkpoint.tensor_file import TensorFile, open_tensor_file, read_tensors
from spo.errors import SpoError
from spo.files import exists_already, named_when_whole
from spo.lora.module_names import FILE_PREFIX, FILE_STYLE, canonical_file_name, file_name_style, modules_by_file_name

TITLE = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_T = TypeVar("_T")
_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change of one module's weight: alpha / rank * up @ down.

    down   [rank, in] of a linear layer, [rank, in, kh, kw] of a convolution
    up     [out, rank], or [out, rank, 1, 1]
    alpha  a number; equal to the rank: no scaling
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this changes: (out, in) or (out, in, kh, kw)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def norm(self) -> float:
        """Frobenius norm of the change, float32, without building it."""
        down, up = self.down.float().flatten(1), self.up.float().flatten(1)
        squared = ((down @ down.T) * (up.T @ up)).sum().clamp(min=0)
        return abs(self.alpha) / self.rank * math.sqrt(float(squared))


def with_one_alpha(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """The same LoRA with the most frequent alpha in every layer, the rest of each scale moved into `up`.

    diffusers (0.42) uses only the most frequent alpha for attention layers of a file of kohya's, whatever the others
    say; ranks may differ. Layers without effect (alpha 0) get a zero `up`.
    """
    alphas = Counter(layer.alpha for layer in layers.values() if layer.alpha)
    if not alphas:
        return dict(layers)
    common = alphas.most_common(1)[0][0]
    return {
        name: layer if layer.alpha == common else LoraLayer(layer.down, layer.up * (layer.alpha / common), common)
        for name, layer in layers.items()
    }


# ------------------------------------------------------------------------------------------------------- metadata


@dataclass(frozen=True)
class LoraFacts:
    """What the metadata of a file tells about its training.

    architecture       "sd15" or "sdxl"; prediction_type: "epsilon" or "v_prediction"
    checkpoint_hash    sha256 of the checkpoint or its first 10 digits; "": unknown
    started_at, finished_at  seconds since 1970; finished_at None: now
    precision          of the frozen network: "float32", "float16" or "bfloat16"
    width_px, height_px  of the training pictures; 0: the architecture's own
    spo_config         every setting of the run, by name; what JSON can hold
    tag_frequency      kohya's {folder: {tag: count}}, shown on the WebUI's card
    """

    architecture: str
    prediction_type: str
    rank: int
    alpha: float
    checkpoint_name: str
    checkpoint_hash: str
    started_at: float
    learning_rate: float
    steps: int
    epochs: int
    seed: int
    batch_size: int
    precision: str
    width_px: int = 0
    height_px: int = 0
    run_id: str = ""
    spo_config: Mapping[str, object] = field(default_factory=dict)
    finished_at: float | None = None
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def lora_metadata(name: str, facts: LoraFacts) -> dict[str, str]:
    """kohya's, Stability's (modelspec) and SPO's own metadata, strings all. `write_lora` adds the hashes.

    name  of the file without `.safetensors`, by which the WebUI's prompts call it

    Raises SpoError for an unknown architecture, prediction type or precision.
    """
    sdxl = _one_of("architecture", facts.architecture, {"sd15": False, "sdxl": True})
    prediction = _one_of("prediction_type", facts.prediction_type, {"epsilon": "epsilon", "v_prediction": "v"})
    mixed = _one_of("precision", facts.precision, {"float32": "no", "float16": "fp16", "bfloat16": "bf16"})
    finished = time.time() if facts.finished_at is None else facts.finished_at
    width, height = (px or (1024 if sdxl else 512) for px in (facts.width_px, facts.height_px))
    metadata = {
        "ss_output_name": name,
        "ss_base_model_version": "sdxl_base_v1-0" if sdxl else "sd_v1",
        "ss_v2": "False",
        "ss_sd_model_name": facts.checkpoint_name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(facts.rank),
        "ss_network_alpha": str(facts.alpha),
        "ss_training_started_at": str(facts.started_at),
        "ss_training_finished_at": str(finished),
        "ss_learning_rate": str(facts.learning_rate),
        "ss_unet_lr": str(facts.learning_rate),
        "ss_steps": str(facts.steps),
        "ss_num_epochs": str(facts.epochs),
        "ss_seed": str(facts.seed),
        "ss_total_batch_size": str(facts.batch_size),
        "ss_mixed_precision": mixed,
        "ss_resolution": f"({width}, {height})",
        "ss_tag_frequency": json.dumps(facts.tag_frequency, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if sdxl else 'v1'}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if sdxl else "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": prediction,
        "modelspec.date": datetime.fromtimestamp(finished, timezone.utc).isoformat(timespec="seconds"),
        "spo_version": __version__,
        "spo_config": json.dumps(facts.spo_config, ensure_ascii=False),
    }
    if facts.checkpoint_hash:
        metadata["ss_sd_model_hash"] = facts.checkpoint_hash[:10]
    if len(facts.checkpoint_hash) == 64:
        metadata["ss_new_sd_model_hash"] = facts.checkpoint_hash
    if facts.run_id:
        metadata["spo_run_id"] = facts.run_id
    return metadata


def _one_of(name: str, value: str, choices: Mapping[str, _T]) -> _T:
    if value not in choices:
        raise SpoError(f'{name} "{value}" is not known; choose from {", ".join(choices)}.')
    return choices[value]


# -------------------------------------------------------------------------------------------------------- writing


def write_lora(
    path: Path | str,
    layers: Mapping[str, LoraLayer],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype = torch.float16,
    replace: bool = False,
    allow_zero: bool = False,
) -> None:
    """Write a LoRA file whole, read it back, and only then give it its name; a failure leaves nothing behind.

    path        NAME.safetensors in an existing folder; NAME is what `ss_output_name`, if there, has to say
    layers      by file name, `lora_unet_...` (`module_names.file_name`)
    metadata    of `lora_metadata`; the hashes `sshs_model_hash` and `sshs_legacy_hash` are added
    dtype       of the weights: float16, bfloat16 or float32; alpha is float32
    replace     an existing file may be replaced, in one step
    allow_zero  also write a LoRA that changes nothing

    Raises SpoError when the file exists and `replace` is off, when a weight is not finite or becomes infinite in
    `dtype`, when no layer changes anything, when shapes do not fit, when the disk refuses, and when the file read back
    is not what was written.
    """
    path = Path(path)
    _check_target(path, metadata, replace)
    tensors = _file_tensors(path, layers, dtype)
    if not allow_zero and not any(_changes_something(tensors, name) for name in layers):
        raise SpoError(f'"{path.name}" is not written: the LoRA would do nothing, every layer of it is zero.')
    metadata = {**metadata, **_hashes(tensors, metadata)}
    content = _serialize(tensors, metadata)
    try:
        with named_when_whole(path, replace=replace) as temporary:
            temporary.write_bytes(content)
            _verify(path, temporary, tensors, metadata)
    except OSError as error:
        raise SpoError(f'"{path}" cannot be written: {error.strerror or error}.') from error


def _check_target(path: Path, metadata: Mapping[str, str], replace: bool) -> None:
    if path.suffix != ".safetensors":
        raise SpoError(f'"{path.name}" is not a name for a LoRA file; it has to end in .safetensors.')
    if not path.parent.is_dir():
        raise SpoError(f'There is no folder "{path.parent}" to write "{path.name}" into.')
    if path.exists() and not replace:
        raise exists_already(path)
    if metadata.get("ss_output_name", path.stem) != path.stem:
        raise SpoError(f'"{path.name}" would say that its name is "{metadata["ss_output_name"]}", not "{path.stem}".')


def _file_tensors(path: Path, layers: Mapping[str, LoraLayer], dtype: torch.dtype) -> dict[str, Tensor]:
    if dtype not in _DTYPES:
        raise SpoError(f"A LoRA file cannot have the dtype {dtype}; choose from {', '.join(_DTYPES.values())}.")
    if not layers:
        raise SpoError(f'"{path.name}" is not written: there are no LoRA layers.')
    tensors = {}
    for name, layer in layers.items():
        if not re.fullmatch(rf"{FILE_PREFIX}\w+", name):
            raise SpoError(f'"{name}" is not a name for a layer of a LoRA file; it has to look like {FILE_PREFIX}...')
        tensors[name + _ALPHA] = torch.tensor(float(layer.alpha), dtype=torch.float32)
        layer = _checked_layer(path, name, layer.down, layer.up, layer.alpha)
        for suffix, weight in ((_DOWN, layer.down), (_UP, layer.up)):
            tensors[name + suffix] = _cast(path, name + suffix, weight.detach().cpu(), dtype)
    return tensors


def _cast(path: Path, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.to(dtype, copy=True).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise SpoError(
            f'"{path.name}" cannot be saved in {_DTYPES[dtype]}: "{name}" reaches {float(weight.abs().max()):.6g}, and '
            f"{_DTYPES[dtype]} ends at {torch.finfo(dtype).max:.6g}; save in float32 or train with a lower rate."
        )
    return cast


def _checked_layer(path: Path, name: str, down: Tensor, up: Tensor, alpha: float) -> LoraLayer:
    """The layer, `up` with as many dimensions as `down`. SpoError when they do not belong together."""
    rank = down.shape[0] if down.ndim else 0
    if down.ndim not in (2, 4) or not rank or up.ndim not in (2, down.ndim) or math.prod(up.shape[1:]) != rank:
        raise SpoError(
            f'"{path.name}" has a layer "{name}" whose shapes do not belong together: '
            f"down {list(down.shape)}, up {list(up.shape)}."
        )
    finite = bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all()) and math.isfinite(alpha)
    if not finite:
        raise SpoError(f'"{path.name}" has a layer "{name}" with values that are not finite (NaN or infinite).')
    return LoraLayer(down, up.reshape(up.shape[0], rank, *[1] * (down.ndim - 2)), alpha)


def _changes_something(tensors: Mapping[str, Tensor], name: str) -> bool:
    return all(bool(tensors[name + suffix].any()) for suffix in (_UP, _DOWN, _ALPHA))


def _serialize(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    import safetensors.torch

    return safetensors.torch.save(tensors, dict(metadata))


def _hashes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's: sha256 of all behind the header; and 8 digits of a piece of a file that has only training facts."""
    content = _serialize(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    body = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def _verify(path: Path, temporary: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """SpoError unless the file at `temporary` holds exactly these tensors and this metadata."""
    try:
        file = open_tensor_file(temporary)
        found = read_tensors(file, file.tensors)
    except SpoError as error:
        raise SpoError(f'"{path.name}" was not saved, what was written cannot be read back: {error}') from error
    wrong = [
        name
        for name in {**tensors, **found}
        if name not in tensors
        or name not in found
        or (found[name].shape, found[name].dtype) != (tensors[name].shape, tensors[name].dtype)
        or not torch.equal(found[name], tensors[name])
    ]
    wrong += [key for key in {**metadata, **file.metadata} if metadata.get(key) != file.metadata.get(key)]
    if wrong:
        raise SpoError(f'"{path.name}" was not saved: read back, {len(wrong)} entries differ, the first "{wrong[0]}".')


# -------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file for a Stable Diffusion UNet.

    architecture         "sd15" or "sdxl"
    layers               by canonical file name (`module_names.file_name`), whatever names the file has; float32, CPU
    text_encoder_layers  names of layers that the file has for text encoders; their weights are not read
    dtype                of the weights in the file, such as "float16"
    """

    path: Path
    architecture: str
    layers: Mapping[str, LoraLayer]
    text_encoder_layers: tuple[str, ...]
    metadata: Mapping[str, str]
    dtype: str
    size_bytes: int

    @property
    def rank(self) -> int:
        """The rank of the UNet's layers, the most frequent one where they differ."""
        return Counter(layer.rank for layer in self.layers.values()).most_common(1)[0][0]


def read_lora(path: Path | str) -> LoraFile:
    """Read a LoRA for SD1.5 or SDXL with kohya's, diffusers' or peft's names, of any rank, also by layer.

    Without `alpha` a layer is not scaled, unless peft's settings (in the metadata, or in adapter_config.json beside a
    file of peft's) say otherwise.

    Raises SpoError with one sentence saying what the file is instead: LoHa, LoKr, DoRA, an embedding, a hypernetwork, a
    whole checkpoint, a LoRA for another network, a file that is damaged or no safetensors file at all.
    """
    path = Path(path)
    _refuse_pickle(path)
    file = open_tensor_file(path)
    _refuse_other_kinds(file)
    entries = _entries(file)
    unet = {name: entry for name, entry in entries.items() if not entry.is_text_encoder}
    text = tuple(name for name, entry in entries.items() if entry.is_text_encoder)
    if not unet:
        _refuse(path, f"a LoRA for text encoders only ({len(text)} layers), without one for the UNet")
    architecture = _architecture(file, unet, text)
    default_alpha = _default_alpha(file)
    layers: dict[str, LoraLayer] = {}
    values = _values(file, [tensor for entry in unet.values() for tensor in entry.parts.values()])
    for name, entry in unet.items():
        canonical = canonical_file_name(name, architecture)
        if canonical is None:
            _refuse(path, f'a LoRA for another network: a Stable Diffusion UNet has no "{entry.module}"')
        if canonical in layers:
            raise SpoError(f'"{path.name}" holds two LoRA layers for the same module, "{canonical}".')
        tensors = {part: values[tensor] for part, tensor in entry.parts.items()}
        rank = tensors["down"].shape[0] if tensors["down"].ndim else 0
        alpha = float(tensors["alpha"].flatten()[0]) if "alpha" in tensors else default_alpha(entry.module, rank)
        layers[canonical] = _checked_layer(path, canonical, tensors["down"], tensors["up"], alpha)
    weights = [entry.parts[part] for entry in unet.values() for part in ("down", "up")]
    dtypes = dict.fromkeys(_long_name(file.tensors[name].dtype) for name in weights)
    return LoraFile(path, architecture, layers, text, dict(file.metadata), " and ".join(dtypes), file.size_bytes)


@dataclass
class _Entry:
    """One layer as the file names it: the module, and the tensor of each part (down, up, alpha)."""

    module: str
    is_text_encoder: bool
    parts: dict[str, str] = field(default_factory=dict)


_WEIGHT = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.[A-Za-z]\w*)?\.weight")
_SCALE = re.compile(r"(.+?)(?:[._]lora)?\.alpha")
_TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoder|text_model\.")
_PARTS = {"down": "down", "A": "down", "up": "up", "B": "up"}


def _entries(file: TensorFile) -> dict[str, _Entry]:
    """Layers by `lora_unet_` name (of either style), text encoder layers by their own."""
    entries: dict[str, _Entry] = {}
    for tensor in file.tensors:
        weight, scale = _WEIGHT.fullmatch(tensor), _SCALE.fullmatch(tensor)
        match = weight or scale
        if match is None:
            raise SpoError(f'"{file.path.name}" holds something that is no part of a LoRA layer, "{tensor}".')
        name, module, is_text_encoder = _layer_name(match[1])
        entry = entries.setdefault(name, _Entry(module, is_text_encoder))
        part = _PARTS[weight[2]] if weight else "alpha"
        if part in entry.parts:
            raise SpoError(f'"{file.path.name}" holds the same thing twice, "{entry.parts[part]}" and "{tensor}".')
        entry.parts[part] = tensor
    for name, entry in entries.items():
        missing = [part for part in ("down", "up") if part not in entry.parts]
        if missing:
            raise SpoError(f'"{file.path.name}" is incomplete: its layer "{name}" has no {" and no ".join(missing)}.')
    return entries


def _layer_name(name: str) -> tuple[str, str, bool]:
    """(name of the layer, its module, whether it is a text encoder's)."""
    module = name.removeprefix("base_model.model.")
    if _TEXT_ENCODER.match(module):
        return module, module, True
    if module.startswith(FILE_PREFIX):
        return module, module, False
    for prefix in ("unet.", "model.", "diffusion_model."):
        module = module.removeprefix(prefix)
    module = module.replace(".processor.", ".")  # older diffusers: attn1.processor.to_q_lora.down
    module += ".0" if module.endswith(".to_out") else ""
    return FILE_PREFIX + module.replace(".", "_"), module, False


def _values(file: TensorFile, names: Iterable[str]) -> dict[str, Tensor]:
    """Float32 copies, so that the file is not kept open."""
    tensors = read_tensors(file, names)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            shape = list(tensor.shape)
            raise SpoError(f'"{file.path.name}" cannot be used: "{name}" is {tensor.dtype} of shape {shape}.')
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


def _long_name(dtype: str) -> str:
    return {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}.get(dtype, dtype.lower())


def _default_alpha(file: TensorFile) -> Callable[[str, int], float]:
    """(module, rank) -> alpha of a layer that has none in the file."""
    config = file.metadata.get("lora_adapter_metadata", "")
    beside = file.path.with_name("adapter_config.json")
    try:
        if not config and any(name.startswith("base_model.model.") for name in file.tensors) and beside.is_file():
            config = beside.read_text(encoding="utf-8")
        settings = json.loads(config) if config else {}
        found = {
            key: settings.get(f"unet.{key}", settings.get(key)) for key in ("lora_alpha", "alpha_pattern", "use_rslora")
        }
        alpha = None if found["lora_alpha"] is None else float(found["lora_alpha"])
        patterns = {key.removeprefix("^"): float(value) for key, value in (found["alpha_pattern"] or {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise SpoError(f'"{file.path.name}" comes with settings of peft that make no sense: {error}.') from error

    def default(module: str, rank: int) -> float:
        own = [value for ending, value in patterns.items() if f".{module}".endswith(f".{ending}")]
        value = own[0] if own else rank if alpha is None else alpha
        return value * math.sqrt(rank) if found["use_rslora"] else float(value)

    return default


# ------------------------------------------------------------------------------------------- what else a file may be

_OTHER_ADAPTERS = {
    r"\.hada_w": "a LoHa file (LyCORIS)",
    r"\.lokr_w": "a LoKr file (LyCORIS)",
    r"\.dora_scale|lora_magnitude_vector": "a DoRA file",
    r"\.oft_|^oft_": "an OFT file",
    r"\.on_input$": "an (IA)^3 file (LyCORIS)",
    r"\.[ab][12]\.weight$": "a GLoRA file (LyCORIS)",
    r"lora_mid": "a LoCon file with Tucker decomposition (LyCORIS)",
    r"^lora_controlnet": "a Control-LoRA",
    r"\.(diff|diff_b|w_norm|b_norm)$": "a file with whole differences of weights (LyCORIS)",
    r"^bundle_emb\.": "a LoRA with embeddings bundled into it",
    r"motion_modules[._]": "an AnimateDiff motion module or its LoRA",
}
_OTHER_LORAS = {
    r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d": "a LoRA for Flux or a relative of it",
    r"joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn[._]": "a LoRA for Stable Diffusion 3 or a relative of it",
    r"^(base_model\.model\.)?(lora_)?(transformer|prior)[._]": "a LoRA for a transformer",
    r"^(lora_unet_|unet\.|diffusion_model\.)*(transformer_blocks|blocks|layers)[._]\d": "a LoRA for a transformer",
}
_NO_LORAS = {
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": "a whole checkpoint",
    r"^(control_model\.|controlnet_|input_hint_block\.)": "a ControlNet",
    r"^(image_proj|ip_adapter)\.": "an IP-Adapter",
    r"^(emb_params$|clip_[lg]$|string_to_param|<.*>$)": "a textual inversion embedding",
    r"^\d+\.\d+\.": "a hypernetwork",
    r"^(encoder|decoder)\.(conv_in|mid|down|up)": "a VAE",
    r"^(unet\.)?(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)\.": "a whole UNet",
    r"^(double_blocks|single_blocks|joint_blocks|(single_)?transformer_blocks)\.": "a whole transformer model",
    r"^(text_model|transformer|text_projection|token_embedding)\b": "a text encoder",
}
_EMBEDDING_WIDTHS = (768, 1024, 1280)
_PICKLED = {
    b"string_to_param": "a textual inversion embedding",
    b"layer_structure": "a hypernetwork",
    b"diffusion_model.": "a whole checkpoint",
    b"lora_": "a LoRA",
}


def _refuse(path: Path, what: str) -> NoReturn:
    raise SpoError(f'"{path.name}" is {what}; what is read here are LoRA files for Stable Diffusion 1.5 and SDXL.')


def _first_kind(kinds: Mapping[str, str], names: Iterable[str]) -> str | None:
    names = list(names)
    return next((kind for pattern, kind in kinds.items() if any(re.search(pattern, name) for name in names)), None)


def _refuse_pickle(path: Path) -> None:
    """A pickle is not loaded, as it may run code; what its index, at its start, mentions tells what it is."""
    try:
        with path.open("rb") as file:
            start = file.read(1 << 22)
    except OSError:
        return  # open_tensor_file says why
    if (start[:2] == b"PK" or start[:1] == b"\x80") and start[8:9] != b"{":  # a header's length may look so
        what = next((what for mark, what in _PICKLED.items() if mark in start), "a file")
        raise SpoError(
            f'"{path.name}" is {what} in the old pickle format, which may run code; a LoRA is read from .safetensors.'
        )


def _refuse_other_kinds(file: TensorFile) -> None:
    names = file.tensors
    if not names:
        _refuse(file.path, "an empty file, without any tensor")
    kind = _first_kind(_OTHER_ADAPTERS, names)
    if kind is None and any("lora" in name for name in names):
        kind = _first_kind(_OTHER_LORAS, names)
    elif kind is None:
        widths = {entry.shape[-1] if entry.shape else 0 for entry in names.values()}
        is_embedding = len(names) <= 2 and widths <= set(_EMBEDDING_WIDTHS)
        kind = "a textual inversion embedding" if is_embedding else _first_kind(_NO_LORAS, names)
        kind = kind or f'not a LoRA ({len(names)} tensors, the first "{next(iter(names))}")'
    if kind is not None:
        _refuse(file.path, kind)


# ----------------------------------------------------------------------------------------------------- architecture

_ELSEWHERE = {"sd2": "a LoRA for Stable Diffusion 2", "refiner": "a LoRA for the SDXL refiner"}
_TEXT_WIDTHS = {768: "sd15", 2048: "sdxl", 1024: "sd2", 1280: "refiner"}
_SMALLEST_WIDTH = 320  # of a real UNet; below it is a test's, whose text features may have any width


def _architecture(file: TensorFile, unet: Mapping[str, _Entry], text: Iterable[str]) -> str:
    """The strongest evidence first: widths of a real network, metadata, text encoders, places of attention, style."""
    found = (
        _by_widths(file, unet)
        or _by_metadata(file.metadata)
        or ("sdxl" if any(re.match(r"lora_te[12]_|text_encoder_2", name) for name in text) else None)
        or _by_places(unet)
        or _by_style(entry.module for entry in unet.values())
    )
    if found is None:
        raise SpoError(
            f'"{file.path.name}" does not tell whether it is for Stable Diffusion 1.5 or SDXL: '
            f"its {len(unet)} layers fit both, and it has no metadata."
        )
    if found in _ELSEWHERE:
        _refuse(file.path, _ELSEWHERE[found])
    return found


def _by_widths(file: TensorFile, unet: Mapping[str, _Entry]) -> str | None:
    for name, entry in unet.items():
        if name.endswith(("_attn2_to_k", "_attn2_to_v")):
            out, inner = file.tensors[entry.parts["up"]].shape[:1], file.tensors[entry.parts["down"]].shape[1:2]
            if out and inner and out[0] >= _SMALLEST_WIDTH and inner[0] in _TEXT_WIDTHS:
                return _TEXT_WIDTHS[inner[0]]
    return None


def _by_metadata(metadata: Mapping[str, str]) -> str | None:
    base, spec = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    if base.startswith("sd_v2") or spec.startswith("stable-diffusion-v2") or metadata.get("ss_v2") == "True":
        return "sd2"
    if spec.startswith("stable-diffusion-xl") and "refiner" in spec:
        return "refiner"
    if base.startswith("sdxl") or spec.startswith("stable-diffusion-xl"):
        return "sdxl"
    return "sd15" if base.startswith("sd_v1") or spec.startswith("stable-diffusion-v1") else None


def _by_places(unet: Iterable[str]) -> str | None:
    """SD1.5 has attention on its finest level and a fourth level; SDXL has it on the coarsest, several blocks deep."""
    names = "\n".join(canonical_file_name(name, "sd15") or "" for name in unet)
    if re.search(r"attentions_\d_transformer_blocks_[1-9]|up_blocks_0_attentions", names):
        return "sdxl"
    return "sd15" if re.search(r"down_blocks_0_attentions|up_blocks_2_attentions|(down|up)_blocks_3_", names) else None


def _by_style(modules: Iterable[str]) -> str | None:
    styles = {file_name_style(module) for module in modules} - {None}
    return next((architecture for architecture, style in FILE_STYLE.items() if styles == {style}), None)


# ---------------------------------------------------------------------------------------------- matching, describing


def check_matches(file: LoraFile, network: nn.Module, naming: str, architecture: str) -> dict[str, LoraLayer]:
    """The file's layers by the network's own module names, in the shapes of its weights.

    network  a UNet whose modules are called in `naming` ("diffusers" or "ldm") and that is an `architecture`

    Raises SpoError when the LoRA is for another architecture, or has a layer that the network lacks or has in another
    size. A 1 x 1 convolution and a linear layer of the same size fit each other.
    """
    name = file.path.name
    if file.architecture != architecture:
        theirs, ours = TITLE[file.architecture], TITLE.get(architecture, architecture)
        raise SpoError(f'"{name}" is a LoRA for {theirs}, and the checkpoint is {ours}.')
    shapes = {
        module_name: tuple(module.weight.shape)
        for module_name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    modules = modules_by_file_name(shapes, naming, architecture)
    missing = [key for key in file.layers if key not in modules]
    if missing:
        raise SpoError(f'"{name}" has {len(missing)} layers that the checkpoint has not, the first "{missing[0]}".')
    return {modules[key]: _shaped_like(name, key, layer, shapes[modules[key]]) for key, layer in file.layers.items()}


def _shaped_like(file_name: str, key: str, layer: LoraLayer, shape: tuple[int, ...]) -> LoraLayer:
    if layer.weight_shape == shape:
        return layer
    if layer.weight_shape[:2] != shape[:2] or math.prod(layer.weight_shape[2:]) != 1 or math.prod(shape[2:]) != 1:
        raise SpoError(
            f'"{file_name}" does not fit the checkpoint: "{key}" changes a weight of {list(layer.weight_shape)}, '
            f"and the checkpoint's has {list(shape)}."
        )
    down = layer.down.reshape(layer.rank, *shape[1:])
    return LoraLayer(down, layer.up.reshape(shape[0], layer.rank, *[1] * (len(shape) - 2)), layer.alpha)


_KINDS = {
    "self-attention": r"_attn1_",
    "cross-attention": r"_attn2_",
    "feed-forward": r"_ff_net_",
    "projection": r"_proj_(in|out)$",
    "residual block": r"_(conv[12]|time_emb_proj|conv_shortcut|in_layers_2|emb_layers_1|out_layers_3|skip_connection)$",
    "resampling": r"samplers_0_conv$|_op$|_blocks_\d+_\d_conv$",
}


@dataclass(frozen=True)
class LoraDescription:
    """What `spo inspect` tells of a LoRA file.

    ranks, alphas   value -> how many layers have it
    kinds           kind of module -> layers
    norm            Frobenius norm of all changes of weights together; zero_layers: layers that change nothing
    facts           what the metadata tells: label -> text, only what is there
    """

    name: str
    architecture: str
    dtype: str
    size_bytes: int
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    kinds: Mapping[str, int]
    text_encoder_layers: int
    norm: float
    zero_layers: int
    facts: Mapping[str, str]

    def text(self) -> str:
        """Short lines, a label and its value each."""
        size = f"{self.size_bytes / 1e6:.1f} MB" if self.size_bytes >= 1e5 else f"{self.size_bytes / 1e3:.1f} kB"
        effect = f"norm of all changes {self.norm:.4g}"
        effect += f", {self.zero_layers} layers change nothing" if self.zero_layers else ""
        rows = {
            "file": f"{self.name}, {size}, {self.dtype}",
            "kind": f"LoRA for {TITLE[self.architecture]}",
            "layers": ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()),
            "text encoder": f"{self.text_encoder_layers} layers, not used by SPO" if self.text_encoder_layers else "",
            "rank": _counted(self.ranks),
            "alpha": _counted(self.alphas),
            "effect": effect,
            **self.facts,
        }
        return "\n".join(f"{label + ':':<14} {value}" for label, value in rows.items() if value)


def describe(file: LoraFile) -> LoraDescription:
    """Facts about a file that was read, for people."""
    norms = [layer.norm() for layer in file.layers.values()]
    return LoraDescription(
        name=file.path.name,
        architecture=file.architecture,
        dtype=file.dtype,
        size_bytes=file.size_bytes,
        ranks=Counter(layer.rank for layer in file.layers.values()),
        alphas=Counter(layer.alpha for layer in file.layers.values()),
        kinds=dict(Counter(map(_kind, file.layers)).most_common()),
        text_encoder_layers=len(file.text_encoder_layers),
        norm=math.hypot(*norms),
        zero_layers=sum(norm == 0 for norm in norms),
        facts=_told(file.metadata),
    )


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), "other")


def _counted(values: Mapping[int, int] | Mapping[float, int]) -> str:
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count} layers)" for value, count in sorted(values.items()))


def _told(metadata: Mapping[str, str]) -> dict[str, str]:
    labels = {
        "prompt alias": "ss_output_name",
        "checkpoint": "ss_sd_model_name",
        "model hash": "ss_sd_model_hash",
        "steps": "ss_steps",
        "learning rate": "ss_learning_rate",
        "seed": "ss_seed",
        "prediction": "modelspec.prediction_type",
        "date": "modelspec.date",
        "hash": "sshs_model_hash",
        "SPO version": "spo_version",
    }
    return {label: metadata[key] for label, key in labels.items() if metadata.get(key) not in (None, "", "None")}
