"""A LoRA file is read: kohya's, diffusers' or peft's names, of any rank; and matched with a network."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from spo.checkpoint.kinds import TITLE, kind_of, kind_of_pickle
from spo.checkpoint.tensor_file import TensorFile, open_tensor_file, read_tensors
from spo.errors import SpoError
from spo.lora.layer import LoraLayer, checked_layer
from spo.lora.module_names import FILE_PREFIX, FILE_STYLE, canonical_file_name, file_name_style, modules_by_file_name


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
    if pickle_kind := kind_of_pickle(path):
        raise SpoError(
            f'"{path.name}" is {pickle_kind.text} in the old pickle format, which may run code; a LoRA is read from '
            ".safetensors."
        )
    file = open_tensor_file(path)
    kind = kind_of(file)
    if kind.family != "lora":
        _refuse(path, kind.text)
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
        layers[canonical] = checked_layer(path, canonical, tensors["down"], tensors["up"], alpha)
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
        values = {
            key: settings.get(f"unet.{key}", settings.get(key)) for key in ("lora_alpha", "alpha_pattern", "use_rslora")
        }
        alpha = None if values["lora_alpha"] is None else float(values["lora_alpha"])
        patterns = {key.removeprefix("^"): float(value) for key, value in (values["alpha_pattern"] or {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise SpoError(f'"{file.path.name}" comes with settings of peft that make no sense: {error}.') from error

    def default(module: str, rank: int) -> float:
        own = [value for ending, value in patterns.items() if f".{module}".endswith(f".{ending}")]
        value = own[0] if own else rank if alpha is None else alpha
        return value * math.sqrt(rank) if values["use_rslora"] else float(value)

    return default


def _refuse(path: Path, what: str) -> NoReturn:
    raise SpoError(f'"{path.name}" is {what}; what is read here are LoRA files for Stable Diffusion 1.5 and SDXL.')


# ----------------------------------------------------------------------------------------------------- architecture

_ELSEWHERE = {"sd2": "a LoRA for Stable Diffusion 2", "refiner": "a LoRA for the SDXL refiner"}
_TEXT_WIDTHS = {768: "sd15", 2048: "sdxl", 1024: "sd2", 1280: "refiner"}
_SMALLEST_WIDTH = 320  # of a real UNet; below it is a test's, whose text features may have any width


def _architecture(file: TensorFile, unet: Mapping[str, _Entry], text: Iterable[str]) -> str:
    """The strongest evidence first: widths of a real network, metadata, text encoders, places of attention, style."""
    architecture = (
        _by_widths(file, unet)
        or _by_metadata(file.metadata)
        or ("sdxl" if any(re.match(r"lora_te[12]_|text_encoder_2", name) for name in text) else None)
        or _by_places(unet)
        or _by_style(entry.module for entry in unet.values())
    )
    if architecture is None:
        raise SpoError(
            f'"{file.path.name}" does not tell whether it is for Stable Diffusion 1.5 or SDXL: '
            f"its {len(unet)} layers fit both, and it has no metadata."
        )
    if architecture in _ELSEWHERE:
        _refuse(file.path, _ELSEWHERE[architecture])
    return architecture


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
    shapes = {place: shape for place, module in network.named_modules() if (shape := _weight_shape(module))}
    modules = modules_by_file_name(shapes, naming, architecture)
    missing = [key for key in file.layers if key not in modules]
    if missing:
        raise SpoError(f'"{name}" has {len(missing)} layers that the checkpoint has not, the first "{missing[0]}".')
    return {modules[key]: _shaped_like(name, key, layer, shapes[modules[key]]) for key, layer in file.layers.items()}


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """[out, in] or [out, in, h, w]; None for what is no linear layer or convolution.

    A linear layer need not be torch's: Forge has its own, whose weight may be packed in 4 bits.
    """
    if isinstance(module, nn.Conv2d):
        return tuple(module.weight.shape)
    out, into = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (out, into) if isinstance(out, int) and isinstance(into, int) else None


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
