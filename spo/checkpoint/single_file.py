"""What is inside a checkpoint, told from the names, shapes and dtypes of its tensors; no network is built.

Everything else (prediction type, attention heads) comes from a WebUI yaml beside the file, the file's
metadata and marker tensors, or Stable Diffusion's usual values. What is not a Stable Diffusion 1.x or SDXL
text-to-image checkpoint is refused with one sentence saying what it is.

Layouts: a single file with LDM / sgm names, as the WebUI uses them, or a folder as diffusers saves it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spo.checkpoint.tensor_file import TensorEntry, TensorFile, open_tensor_file, refuse
from spo.errors import SpoError, nearest

Architecture = Literal["sd15", "sdxl"]
PredictionType = Literal["epsilon", "v_prediction"]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX: Mapping[Architecture, str] = {
    "sd15": "cond_stage_model.transformer.",
    "sdxl": "conditioner.embedders.0.transformer.",
}
OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."
VOCABULARY = 49408

_SCALE_FACTOR: Mapping[Architecture, float] = {"sd15": 0.18215, "sdxl": 0.13025}
_TITLE: Mapping[Architecture, str] = {"sd15": "Stable Diffusion 1.x", "sdxl": "Stable Diffusion XL"}
_PREDICTION_WORDS: Mapping[str, PredictionType] = {
    "epsilon": "epsilon", "eps": "epsilon",
    "v_prediction": "v_prediction", "v": "v_prediction", "v-prediction": "v_prediction", "vpred": "v_prediction",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- what was found


@dataclass(frozen=True)
class UNetShape:
    """Sizes of the UNet. One entry a level, the finest first.

    channels            widths; res_blocks: residual blocks a level on the way down
    depths              transformer blocks per attention, 0: a level without attention; middle_depth: in the middle
    heads               attention heads; the files do not tell, see `inspect_checkpoint`
    context_width       width of the text features
    linear_projection   SDXL's way into and out of a transformer; SD1.x uses 1 x 1 convolutions
    added_width         width of SDXL's pooled text and embedded sizes together, else 0
    """

    channels: tuple[int, ...]
    res_blocks: int
    depths: tuple[int, ...]
    middle_depth: int
    heads: tuple[int, ...]
    context_width: int
    linear_projection: bool
    added_width: int


@dataclass(frozen=True)
class VaeShape:
    """Sizes of the VAE: widths by level, the finest first; residual blocks a level in the encoder."""

    channels: tuple[int, ...]
    res_blocks: int
    latent_channels: int

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, 8 in every real checkpoint."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TextEncoderShape:
    """Sizes of one text encoder: "clip" (transformers' names) or "open_clip"; projection 0: has none."""

    kind: Literal["clip", "open_clip"]
    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int
    positions: int
    projection: int
    activation: str
    norm_epsilon: float = 1e-5


@dataclass(frozen=True)
class NoiseSchedule:
    """The training schedule's betas: square roots ("scaled_linear") or themselves ("linear") from start to end."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"


@dataclass(frozen=True)
class CheckpointInfo:
    """What `inspect_checkpoint` found.

    prediction_source   where the prediction type comes from, in words
    zero_terminal_snr   the checkpoint says that it was trained with its last noise level at zero signal
    vae, text_encoders  None / empty when they are not in the file
    scale_factor        network latent = VAE latent * scale_factor
    dtypes              of the UNet's tensors, the most frequent first, by safetensors' names
    *_parameters        numbers of weights; EMA copies and schedules in the file are not counted
    config_path         the yaml that was read, if any
    """

    path: Path
    is_folder: bool
    architecture: Architecture
    prediction_type: PredictionType
    prediction_source: str
    zero_terminal_snr: bool
    unet: UNetShape
    vae: VaeShape | None
    text_encoders: tuple[TextEncoderShape, ...]
    scale_factor: float
    schedule: NoiseSchedule
    dtypes: tuple[str, ...]
    size_bytes: int
    unet_parameters: int
    vae_parameters: int
    text_parameters: int
    config_path: Path | None

    @property
    def parameters(self) -> int:
        """Numbers of weights of all networks together."""
        return self.unet_parameters + self.vae_parameters + self.text_parameters


def inspect_checkpoint(
    path: Path | str, *, config_path: Path | str | None = None, prediction_type: str | None = None
) -> CheckpointInfo:
    """What the checkpoint at `path` is: a .safetensors or .ckpt file, or a diffusers folder.

    config_path      a WebUI yaml; default: the one of the same name beside the file, if there is one
    prediction_type  overrides what is found: "epsilon" or "v_prediction"

    Prediction type: the argument, else the yaml (`parameterization: v`, sgm's VScaling), else the metadata
    `modelspec.prediction_type`, else a marker tensor `v_pred`, else epsilon.
    Heads of the UNet: the yaml's `num_heads` or `num_head_channels`, else 8 heads (SD1.x) or 64 channels a head (SDXL).
    Heads of a text encoder: width / 64, or the `num_attention_heads` of a transformers config.json: at
    NAME.text_encoder_config.json (second encoder: text_encoder_2_config.json), in the folder that the yaml names as
    the encoder's `version`, or at text_encoder_config.json beside the checkpoint if the sizes agree.

    Raises SpoError, one sentence, for everything that is not such a checkpoint.
    """
    path = Path(path)
    override = None if prediction_type is None else _prediction_word(prediction_type, "prediction type")
    if path.is_dir():
        if config_path is not None:
            refuse(path, "is a diffusers folder, which brings its own configuration; leave the yaml away")
        try:
            return _inspect_folder(path, override)
        except (KeyError, TypeError, ValueError) as error:
            raise SpoError(f'"{path}" has an incomplete or damaged configuration ({error})') from error
    file = open_tensor_file(path)
    architecture = _architecture(file)
    hints = _yaml_hints(path, config_path)
    prediction, source = _prediction(file, hints, override)
    parts = [_parameters(file.tensors, prefix) for prefix in (UNET_PREFIX, VAE_PREFIX, "cond")]
    return CheckpointInfo(
        path=path,
        is_folder=False,
        architecture=architecture,
        prediction_type=prediction,
        prediction_source=source,
        zero_terminal_snr="ztsnr" in file.tensors,
        unet=_unet_shape(file, architecture, hints),
        vae=vae_shape(file, VAE_PREFIX) if f"{VAE_PREFIX}decoder.conv_in.weight" in file.tensors else None,
        text_encoders=_text_encoder_shapes(file, architecture, hints),
        scale_factor=hints.scale_factor or _SCALE_FACTOR[architecture],
        schedule=hints.schedule,
        dtypes=_dtypes(file.tensors, UNET_PREFIX),
        size_bytes=file.size_bytes,
        unet_parameters=parts[0],
        vae_parameters=parts[1],
        text_parameters=parts[2],
        config_path=hints.path,
    )


def describe(info: CheckpointInfo) -> list[str]:
    """The facts as short lines of text, for `spo inspect`."""
    unet = info.unet
    attention = ", ".join(
        f"{width}" + (f" x {depth} ({heads} heads)" if depth else "")
        for width, depth, heads in zip(unet.channels, unet.depths, unet.heads, strict=True)
    )
    missing = "not in the file"
    text = "; ".join(f"{e.kind} {e.width} wide, {e.layers} layers, {e.heads} heads" for e in info.text_encoders)
    vae = info.vae and f"{', '.join(map(str, info.vae.channels))}; scale factor {info.scale_factor:g}"
    lines = [
        f"file          {info.path}",
        f"layout        {'diffusers folder' if info.is_folder else 'single file'}, {info.size_bytes / 1e9:.2f} GB, "
        f"{'/'.join(info.dtypes)}",
        f"architecture  {_TITLE[info.architecture]} ({info.architecture})",
        f"prediction    {info.prediction_type} ({info.prediction_source})"
        + (", zero terminal SNR" if info.zero_terminal_snr else ""),
        f"UNet          {info.unet_parameters / 1e6:.1f} M weights; channels x transformer blocks: {attention}; "
        f"middle x {unet.middle_depth}; text {unet.context_width} wide",
        f"VAE           {vae or missing}",
        f"text encoder  {text or missing}",
    ]
    return lines + ([f"yaml          {info.config_path}"] if info.config_path else [])


def file_sha256(path: Path | str) -> str:
    """sha256 of the whole file, 64 hex digits, as the WebUI computes it for checkpoints."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SpoError(f'"{path}" cannot be read: {error.strerror or error}') from error
    return digest.hexdigest()


def short_hash(path: Path | str) -> str:
    """The 10 hex digits by which the WebUI names a checkpoint (`Model hash` in infotext)."""
    return file_sha256(path)[:10]


# ---------------------------------------------------------------------------------------------- which kind it is


def _architecture(file: TensorFile) -> Architecture:
    _refuse_other_kinds(file)
    names = file.tensors
    unet = _Tensors(file, UNET_PREFIX)
    in_channels = unet.size("input_blocks.0.0.weight", 1)
    is_xl = unet.has("label_emb.0.0.weight")

    def starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    context = {e.shape[1] for name, e in names.items() if name.endswith(".attn2.to_k.weight") and len(e.shape) == 2}
    if starts("edm_"):
        refuse(file.path, "is an SDXL checkpoint with EDM preconditioning (Playground 2.5), which is not supported")
    if any(".time_stack." in name for name in names):
        refuse(file.path, "is a video checkpoint (Stable Video Diffusion), not text-to-image")
    if starts("cond_stage_model.roberta."):
        refuse(file.path, "is an AltDiffusion checkpoint, which is not supported")
    if starts("cond_stage_model.model.", "embedder.model.", "depth_model.") or (1024 in context and not is_xl):
        variant = {9: "2.x inpainting", 5: "2.x depth", 7: "2.x upscaler"}.get(in_channels, "2.x")
        variant = "2.1 unCLIP" if is_xl else variant
        refuse(file.path, f"is a Stable Diffusion {variant} checkpoint; only SD 1.x and SDXL are supported")
    if starts("conditioner.embedders.0.model.") or (is_xl and context == {1280}):
        refuse(file.path, "is the SDXL refiner, which only finishes pictures; use the SDXL base checkpoint")
    family = "SDXL" if is_xl else "SD 1.x"
    if in_channels == 9:
        refuse(file.path, f"is an {family} inpainting checkpoint (9 input channels); use the text-to-image one")
    if in_channels == 8:
        refuse(file.path, f"is an {family} instruct-pix2pix checkpoint (8 input channels); use the text-to-image one")
    if in_channels != 4:
        refuse(file.path, f"has a UNet with {in_channels} input channels; text-to-image checkpoints have 4")
    if not context:
        refuse(file.path, "has a UNet without cross-attention, so it cannot follow prompts")
    return "sdxl" if is_xl else "sd15"


_LORA_MARKS = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lora.down.", "_lora.down.", ".hada_w", ".lokr_w")
_LORA_STARTS = ("lora_unet_", "lora_te", "lycoris_", "oft_unet_")
_TEXT_STARTS = (
    "text_model.", "cond_stage_model.", "conditioner.", "transformer.text_model.", "transformer.resblocks.",
    "embeddings.token_embedding.", "token_embedding.", "encoder.block.0.layer.", "text_encoder",
)  # fmt: skip


def _refuse_other_kinds(file: TensorFile) -> None:
    """Raises for a file without an LDM UNet, saying what it is."""
    names = file.tensors

    def mark(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    def starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    path, use = file.path, "a complete SD 1.x or SDXL checkpoint is needed"
    if mark(*_LORA_MARKS) or starts(*_LORA_STARTS):
        refuse(path, f"is a LoRA, which only adds to a checkpoint; {use}")
    if "emb_params" in names or set(names) == {"clip_l", "clip_g"}:
        refuse(path, f"is a textual inversion embedding; {use}")
    if starts("control_model.", "controlnet_cond_embedding.", "input_hint_block."):
        refuse(path, f"is a ControlNet; {use}")
    if mark("joint_blocks.0."):
        refuse(path, "is a Stable Diffusion 3 checkpoint; only SD 1.x and SDXL are supported")
    if mark("double_blocks.0.img_attn.", "single_transformer_blocks.0."):
        refuse(path, "is a Flux checkpoint; only SD 1.x and SDXL are supported")
    if f"{UNET_PREFIX}input_blocks.0.0.weight" in names:
        return
    if starts(UNET_PREFIX):
        refuse(path, "holds another kind of diffusion network; only SD 1.x and SDXL are supported")
    if "input_blocks.0.0.weight" in names or ("conv_in.weight" in names and mark("down_blocks.0.resnets.0.")):
        refuse(path, f"holds a UNet alone; {use}")
    if starts(VAE_PREFIX, "encoder.conv_in.", "decoder.conv_in.") and not starts("cond_stage_model.", "conditioner."):
        refuse(path, f"is a VAE, which can be given besides a checkpoint; {use}")
    if starts(*_TEXT_STARTS):
        refuse(path, f"is a text encoder alone; {use}")
    some = ", ".join(list(names)[:3]) or "none"
    refuse(path, f"holds no Stable Diffusion UNet (its first tensors: {some}); {use}")


# ---------------------------------------------------------------------------------------------- sizes from tensors


@dataclass(frozen=True)
class _Tensors:
    """The entries under a prefix; asking for one that is missing raises SpoError."""

    file: TensorFile
    prefix: str

    def has(self, name: str) -> bool:
        return self.prefix + name in self.file.tensors

    def size(self, name: str, axis: int = 0) -> int:
        entry = self.file.tensors.get(self.prefix + name)
        if entry is None:
            refuse(self.file.path, f'is incomplete: the tensor "{self.prefix}{name}" is missing')
        if axis >= len(entry.shape):
            refuse(self.file.path, f'is damaged: the tensor "{self.prefix}{name}" has the shape {list(entry.shape)}')
        return entry.shape[axis]

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... there are."""
        number = 0
        while self.has(pattern.format(number)):
            number += 1
        return number


def _unet_shape(file: TensorFile, architecture: Architecture, hints: _YamlHints) -> UNetShape:
    unet = _Tensors(file, UNET_PREFIX)
    levels: list[list[tuple[int, int]]] = [[]]  # (width, depth) of each residual block, level by level
    for block in itertools.count(1):
        if unet.has(f"input_blocks.{block}.0.op.weight"):
            levels.append([])
        elif unet.has(f"input_blocks.{block}.0.out_layers.3.weight"):
            width = unet.size(f"input_blocks.{block}.0.out_layers.3.weight")
            levels[-1].append((width, _depth(unet, f"input_blocks.{block}.1")))
        else:
            break
    depths = tuple(level[0][1] if level else 0 for level in levels)
    middle_depth = _depth(unet, "middle_block.1")
    regular = all(level and len(set(level)) == 1 and len(level) == len(levels[0]) for level in levels)
    outputs = [_depth(unet, f"output_blocks.{i}.1") for i in range(unet.count("output_blocks.{}.0.in_layers.2.weight"))]
    mirrored = [depth for depth in reversed(depths) for _ in range(len(levels[0]) + 1)]
    if not regular or outputs != mirrored or not middle_depth or depths[-1] not in (0, middle_depth):
        refuse(file.path, "has a UNet of irregular layout (pruned or distilled, like SSD-1B), which is not supported")
    channels = tuple(level[0][0] for level in levels)
    if unet.size("input_blocks.0.0.weight") != channels[0]:
        refuse(file.path, "has a UNet whose first level is wider than its input, which is not supported")
    transformer = next(
        block
        for block in ("middle_block.1", *(f"input_blocks.{i}.1" for i in range(20)))
        if unet.has(f"{block}.transformer_blocks.0.attn2.to_k.weight")
    )
    return UNetShape(
        channels=channels,
        res_blocks=len(levels[0]),
        depths=depths,
        middle_depth=middle_depth,
        heads=_unet_heads(file.path, architecture, hints, channels, depths),
        context_width=unet.size(f"{transformer}.transformer_blocks.0.attn2.to_k.weight", 1),
        linear_projection=len(file.tensors[f"{UNET_PREFIX}{transformer}.proj_in.weight"].shape) == 2,
        added_width=unet.size("label_emb.0.0.weight", 1) if architecture == "sdxl" else 0,
    )


def _depth(unet: _Tensors, block: str) -> int:
    return unet.count(block + ".transformer_blocks.{}.attn2.to_k.weight")


def _unet_heads(
    path: Path, architecture: Architecture, hints: _YamlHints, channels: Sequence[int], depths: Sequence[int]
) -> tuple[int, ...]:
    head_width = hints.unet_head_width or (64 if architecture == "sdxl" and not hints.unet_heads else 0)
    heads = [width // head_width if head_width else hints.unet_heads or 8 for width in channels]
    for level, (width, depth) in enumerate(zip(channels, depths, strict=True)):
        last = level == len(channels) - 1  # the middle, which always attends, has the last level's width
        if (depth or last) and (heads[level] < 1 or width % heads[level] or (head_width and width % head_width)):
            wanted = f"{head_width} channels a head" if head_width else f"{heads[level]} heads"
            refuse(path, f"has {width} channels in level {level}, which do not divide into {wanted}: say num_heads or "
                          "num_head_channels in a yaml beside the checkpoint")  # fmt: skip
    return tuple(max(1, number) for number in heads)


def vae_shape(file: TensorFile, prefix: str) -> VaeShape:
    """Sizes of the VAE whose LDM names begin with `prefix` in the file; SpoError if it is not Stable Diffusion's."""
    vae = _Tensors(file, prefix)
    levels = vae.count("encoder.down.{}.block.0.conv2.weight")
    if not vae.has("post_quant_conv.weight") or not vae.has("quant_conv.weight"):
        refuse(file.path, "holds a VAE without quant_conv, so not one of Stable Diffusion 1.x or SDXL")
    if vae.size("post_quant_conv.weight", 1) != 4 or vae.size("decoder.conv_in.weight", 1) != 4:
        channels = vae.size("post_quant_conv.weight", 1)
        refuse(file.path, f"holds a VAE with {channels} latent channels; Stable Diffusion 1.x and SDXL have 4")
    if levels < 2 or any(vae.has(f"encoder.down.{level}.attn.0.norm.weight") for level in range(levels)):
        refuse(file.path, "holds a VAE of another layout than Stable Diffusion's")
    return VaeShape(
        channels=tuple(vae.size(f"encoder.down.{level}.block.0.conv2.weight") for level in range(levels)),
        res_blocks=vae.count("encoder.down.0.block.{}.conv2.weight"),
        latent_channels=4,
    )


def clip_prefix(file: TensorFile, architecture: Architecture) -> str:
    """What precedes `embeddings.`, `encoder.` and `final_layer_norm.`: some old files lack `text_model.`."""
    prefix = CLIP_PREFIX[architecture]
    full = f"{prefix}text_model."
    return full if f"{full}embeddings.token_embedding.weight" in file.tensors else prefix


def _text_encoder_shapes(
    file: TensorFile, architecture: Architecture, hints: _YamlHints
) -> tuple[TextEncoderShape, ...]:
    found = []
    clip = _Tensors(file, clip_prefix(file, architecture))
    if clip.has("embeddings.token_embedding.weight"):
        found.append(
            TextEncoderShape(
                kind="clip",
                width=clip.size("embeddings.token_embedding.weight", 1),
                layers=clip.count("encoder.layers.{}.mlp.fc1.weight"),
                heads=max(1, clip.size("embeddings.token_embedding.weight", 1) // 64),
                mlp_width=clip.size("encoder.layers.0.mlp.fc1.weight"),
                vocabulary=clip.size("embeddings.token_embedding.weight"),
                positions=clip.size("embeddings.position_embedding.weight"),
                projection=0,
                activation="quick_gelu",
            )
        )
    big = _Tensors(file, OPEN_CLIP_PREFIX)
    if architecture == "sdxl" and big.has("token_embedding.weight"):
        found.append(
            TextEncoderShape(
                kind="open_clip",
                width=big.size("token_embedding.weight", 1),
                layers=big.count("transformer.resblocks.{}.mlp.c_fc.weight"),
                heads=max(1, big.size("token_embedding.weight", 1) // 64),
                mlp_width=big.size("transformer.resblocks.0.mlp.c_fc.weight"),
                vocabulary=big.size("token_embedding.weight"),
                positions=big.size("positional_embedding"),
                projection=big.size("text_projection", 1),
                activation="gelu",
            )
        )
    if architecture == "sdxl" and len(found) == 1:
        refuse(file.path, "is an SDXL checkpoint with only one of its two text encoders")
    for encoder in found:
        if encoder.vocabulary < VOCABULARY or encoder.positions < 77:
            refuse(file.path, f"has a text encoder for {encoder.vocabulary} tokens at {encoder.positions} places; "
                               f"CLIP's has {VOCABULARY} at 77")  # fmt: skip
    return tuple(_with_config_hint(file.path, e, number, hints) for number, e in enumerate(found))


def _with_config_hint(path: Path, shape: TextEncoderShape, number: int, hints: _YamlHints) -> TextEncoderShape:
    """The shape with heads, activation and epsilon of a transformers config.json, where one is found."""
    name = "text_encoder_config.json" if number == 0 else "text_encoder_2_config.json"
    own = path.with_name(f"{path.stem}.{name}")
    folder = hints.text_folders[number] if number < len(hints.text_folders) else None
    places = [own, *([folder / "config.json"] if folder else []), path.with_name(name)]
    for place in places:
        if not place.is_file():
            continue
        config = _json(place)
        config = config.get("text_config", config)
        if (config.get("hidden_size"), config.get("num_hidden_layers")) != (shape.width, shape.layers):
            if place == places[-1]:
                continue  # it belongs to another checkpoint of that folder
            refuse(place, f"does not fit the text encoder in {path.name}, which is {shape.width} wide with "
                           f"{shape.layers} layers")  # fmt: skip
        heads = int(config.get("num_attention_heads", shape.heads))
        if heads < 1 or shape.width % heads:
            refuse(place, f"says num_attention_heads {heads}, which does not divide {shape.width}")
        activation = str(config.get("hidden_act", shape.activation))
        epsilon = float(config.get("layer_norm_eps", shape.norm_epsilon))
        return dataclasses.replace(shape, heads=heads, activation=activation, norm_epsilon=epsilon)
    return shape


def _parameters(tensors: Mapping[str, TensorEntry], prefix: str) -> int:
    floats = (e for name, e in tensors.items() if name.startswith(prefix) and e.dtype not in ("I64", "I32"))
    return sum(math.prod(entry.shape) for entry in floats)


def _dtypes(tensors: Mapping[str, TensorEntry], prefix: str) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for name, entry in tensors.items():
        if name.startswith(prefix):
            counts[entry.dtype] = counts.get(entry.dtype, 0) + 1
    return tuple(sorted(counts, key=lambda dtype: -counts[dtype]))


# ---------------------------------------------------------------------------------------------- yaml and metadata


@dataclass(frozen=True)
class _YamlHints:
    """What a WebUI yaml adds to the tensors; 0 or None where it says nothing."""

    path: Path | None = None
    prediction_type: PredictionType | None = None
    unet_heads: int = 0
    unet_head_width: int = 0
    scale_factor: float = 0.0
    schedule: NoiseSchedule = NoiseSchedule()
    text_folders: tuple[Path | None, ...] = ()


def _yaml_hints(checkpoint: Path, config_path: Path | str | None) -> _YamlHints:
    path = checkpoint.with_suffix(".yaml") if config_path is None else Path(config_path)
    if not path.is_file():
        if config_path is not None:
            raise SpoError(f'there is no configuration file "{path}"')
        return _YamlHints()
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpoError(f'"{path}" is not a readable yaml file') from error
    params = _child(content, "model", "params")
    if not params:
        refuse(path, "is not a Stable Diffusion configuration: it has no model.params")
    network = _child(params, "unet_config", "params") or _child(params, "network_config", "params")
    try:
        head_width = int(network.get("num_head_channels") or 0)
        return _YamlHints(
            path=path,
            prediction_type=_yaml_prediction(params),
            unet_heads=max(0, int(network.get("num_heads") or 0)),
            unet_head_width=max(0, head_width),
            scale_factor=float(params.get("scale_factor") or 0.0),
            schedule=NoiseSchedule(
                float(params.get("linear_start", NoiseSchedule.beta_start)),
                float(params.get("linear_end", NoiseSchedule.beta_end)),
            ),
            text_folders=tuple(_version_folder(path, embedder) for embedder in _text_embedders(params)),
        )
    except (TypeError, ValueError) as error:
        raise SpoError(f'"{path}" has a value of the wrong kind: {error}') from error


def _child(tree: Any, *names: str) -> dict[str, Any]:
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _yaml_prediction(params: dict[str, Any]) -> PredictionType | None:
    scaling = _child(params, "denoiser_config", "params", "scaling_config").get("target")
    if isinstance(scaling, str):
        return "v_prediction" if scaling.rsplit(".", 1)[-1].startswith("V") else "epsilon"
    word = params.get("parameterization")
    return None if word is None else _prediction_word(str(word), "parameterization in the yaml")


def _text_embedders(params: dict[str, Any]) -> list[dict[str, Any]]:
    if "cond_stage_config" in params:
        return [_child(params, "cond_stage_config", "params")]
    models = _child(params, "conditioner_config", "params").get("emb_models")
    return [_child(model, "params") for model in models[:2]] if isinstance(models, list) else []


def _version_folder(yaml_path: Path, embedder: dict[str, Any]) -> Path | None:
    version = embedder.get("version")
    folder = yaml_path.parent / str(version)
    return folder if version and (folder / "config.json").is_file() else None


def _prediction_word(word: str, what: str) -> PredictionType:
    found = _PREDICTION_WORDS.get(word.strip().lower())
    if found is None:
        choices = ("epsilon", "v_prediction")
        raise SpoError(f'{what} "{word}" is not known{nearest(word, choices)} (accepted: epsilon, v_prediction)')
    return found


def _prediction(file: TensorFile, hints: _YamlHints, override: PredictionType | None) -> tuple[PredictionType, str]:
    if override is not None:
        return override, "as asked for"
    if hints.prediction_type is not None:
        return hints.prediction_type, "from the yaml"
    if word := file.metadata.get("modelspec.prediction_type"):
        return _prediction_word(word, f"modelspec.prediction_type in {file.path.name}"), "from the file's metadata"
    if "v_pred" in file.tensors:
        return "v_prediction", "from the file's v_pred mark"
    return "epsilon", "the usual one, the file says nothing"


# ---------------------------------------------------------------------------------------------- diffusers folders


@dataclass(frozen=True)
class FolderPart:
    """One network of a diffusers folder: its config.json, and its weight files (several when sharded)."""

    folder: Path
    config: Mapping[str, Any]
    files: tuple[TensorFile, ...]


def open_folder_part(folder: Path) -> FolderPart:
    """The network saved in `folder`, full precision before the fp16 variant; SpoError when something is missing."""
    if not (folder / "config.json").is_file():
        raise SpoError(f'"{folder}" has no config.json, so it is not a network saved by diffusers')
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for ending in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
            variant = ".fp16" if ending.startswith(".fp16") else ""
            shards = folder / f"{stem}{ending.removeprefix('.fp16')}.index{variant}.json"
            paths = [folder / f"{stem}{ending}"]
            if shards.is_file():
                paths = sorted({folder / name for name in _json(shards).get("weight_map", {}).values()})
            if paths and (shards.is_file() or paths[0].is_file()):
                return FolderPart(folder, _json(folder / "config.json"), tuple(map(open_tensor_file, paths)))
    raise SpoError(f'"{folder}" has a config.json but no weights (.safetensors or .bin)')


def _inspect_folder(path: Path, override: PredictionType | None) -> CheckpointInfo:
    index = _json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", "StableDiffusionPipeline"))
    if not pipeline.startswith("StableDiffusion") or pipeline.startswith("StableDiffusion3"):
        refuse(path, f"is a diffusers folder for {pipeline}; only SD 1.x and SDXL are supported")
    if not (path / "unet").is_dir():
        files = sorted(p.name for p in path.glob("*") if p.suffix in (".safetensors", ".ckpt"))
        some = f"; give one of its files, such as {files[0]}" if files else ""
        refuse(path, f"is a folder without unet/, so it is not a diffusers checkpoint{some}")
    unet_part = open_folder_part(path / "unet")
    config = unet_part.config
    architecture = _folder_architecture(path, config)
    wanted = ["vae", "text_encoder", *(["text_encoder_2"] if architecture == "sdxl" else [])]
    missing = [part for part in wanted if not (path / part).is_dir()]
    if missing:
        refuse(path, f"is a diffusers folder without {' and '.join(f'{part}/' for part in missing)}")
    vae_part, *text_parts = (open_folder_part(path / part) for part in wanted)
    scheduler_path = path / "scheduler" / "scheduler_config.json"
    scheduler = _json(scheduler_path) if scheduler_path.is_file() else {}
    prediction, source = override, "as asked for"
    if prediction is None:
        word = scheduler.get("prediction_type")
        source = "from the scheduler's configuration" if word else "the usual one, the folder says nothing"
        prediction = _prediction_word(str(word or "epsilon"), f"prediction_type in {scheduler_path}")
    parts = (unet_part, vae_part, *text_parts)
    counts = [sum(_parameters(file.tensors, "") for file in part.files) for part in parts]
    defaults = NoiseSchedule()
    return CheckpointInfo(
        path=path,
        is_folder=True,
        architecture=architecture,
        prediction_type=prediction,
        prediction_source=source,
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        unet=_folder_unet_shape(config),
        vae=_folder_vae_shape(vae_part.config),
        text_encoders=tuple(_folder_text_shape(part, number) for number, part in enumerate(text_parts)),
        scale_factor=float(vae_part.config.get("scaling_factor", _SCALE_FACTOR[architecture])),
        schedule=NoiseSchedule(
            float(scheduler.get("beta_start", defaults.beta_start)),
            float(scheduler.get("beta_end", defaults.beta_end)),
            str(scheduler.get("beta_schedule", defaults.beta_schedule)),
        ),
        dtypes=_dtypes(unet_part.files[0].tensors, ""),
        size_bytes=sum(file.size_bytes for part in parts for file in part.files),
        unet_parameters=counts[0],
        vae_parameters=counts[1],
        text_parameters=sum(counts[2:]),
        config_path=None,
    )


def _folder_architecture(path: Path, config: Mapping[str, Any]) -> Architecture:
    is_xl = config.get("addition_embed_type") == "text_time"
    context, channels = config.get("cross_attention_dim"), config.get("in_channels", 4)
    family = "SDXL" if is_xl else "SD 1.x"
    if not is_xl and context == 1024:
        refuse(path, "is a Stable Diffusion 2.x checkpoint; only SD 1.x and SDXL are supported")
    if is_xl and context == 1280:
        refuse(path, "is the SDXL refiner, which only finishes pictures; use the SDXL base checkpoint")
    if channels != 4:
        kind = {9: f"an {family} inpainting", 8: f"an {family} instruct-pix2pix"}.get(channels, "a special")
        refuse(path, f"is {kind} checkpoint ({channels} input channels); use the text-to-image one")
    return "sdxl" if is_xl else "sd15"


def _folder_unet_shape(config: Mapping[str, Any]) -> UNetShape:
    channels = tuple(config["block_out_channels"])
    depth, heads = config.get("transformer_layers_per_block", 1), config.get("attention_head_dim", 8)
    depths = [depth] * len(channels) if isinstance(depth, int) else list(depth)
    attends = ["CrossAttn" in name for name in config["down_block_types"]]
    blocks = config.get("layers_per_block", 2)
    return UNetShape(
        channels=channels,
        res_blocks=blocks if isinstance(blocks, int) else blocks[0],
        depths=tuple(d if attending else 0 for d, attending in zip(depths, attends, strict=True)),
        middle_depth=depths[-1],
        heads=(heads,) * len(channels) if isinstance(heads, int) else tuple(heads),
        context_width=int(config["cross_attention_dim"]),
        linear_projection=bool(config.get("use_linear_projection", False)),
        added_width=int(config.get("projection_class_embeddings_input_dim") or 0),
    )


def _folder_vae_shape(config: Mapping[str, Any]) -> VaeShape:
    return VaeShape(
        channels=tuple(config["block_out_channels"]),
        res_blocks=int(config.get("layers_per_block", 1)),
        latent_channels=int(config.get("latent_channels", 4)),
    )


def _folder_text_shape(part: FolderPart, number: int) -> TextEncoderShape:
    config = part.config
    shape = TextEncoderShape(
        kind="clip" if number == 0 else "open_clip",
        width=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        mlp_width=int(config["intermediate_size"]),
        vocabulary=int(config.get("vocab_size", VOCABULARY)),
        positions=int(config.get("max_position_embeddings", 77)),
        projection=int(config.get("projection_dim", 512)) if number else 0,
        activation=str(config.get("hidden_act", "quick_gelu")),
        norm_epsilon=float(config.get("layer_norm_eps", 1e-5)),
    )
    if shape.vocabulary < VOCABULARY or shape.positions < 77:
        refuse(part.folder, f"has a text encoder for {shape.vocabulary} tokens at {shape.positions} places; "
                             f"CLIP's has {VOCABULARY} at 77")  # fmt: skip
    return shape


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpoError(f'"{path}" is not a readable JSON file') from error
    if not isinstance(content, dict):
        raise SpoError(f'"{path}" does not hold a JSON object')
    return content
