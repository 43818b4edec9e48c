"""Sizes of a checkpoint's networks, from the names and shapes of its tensors; no network is built."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spo.checkpoint.kinds import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    Architecture,
)
from spo.checkpoint.tensor_file import TensorFile, read_json, refuse
from spo.checkpoint.webui_yaml import YamlHints

VOCABULARY = 49408


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


def unet_shape(file: TensorFile, architecture: Architecture, hints: YamlHints) -> UNetShape:
    unet = _Tensors(file, UNET_PREFIX)
    unet.size("input_blocks.0.0.weight", 1)
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
    path: Path, architecture: Architecture, hints: YamlHints, channels: Sequence[int], depths: Sequence[int]
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


def text_encoder_shapes(file: TensorFile, architecture: Architecture, hints: YamlHints) -> tuple[TextEncoderShape, ...]:
    encoders = []
    clip = _Tensors(file, clip_prefix(file, architecture))
    if clip.has("embeddings.token_embedding.weight"):
        encoders.append(
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
        encoders.append(
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
    if architecture == "sdxl" and len(encoders) == 1:
        refuse(file.path, "is an SDXL checkpoint with only one of its two text encoders")
    for encoder in encoders:
        if encoder.vocabulary < VOCABULARY or encoder.positions < 77:
            refuse(file.path, f"has a text encoder for {encoder.vocabulary} tokens at {encoder.positions} places; "
                               f"CLIP's has {VOCABULARY} at 77")  # fmt: skip
    return tuple(_with_config_hint(file.path, e, number, hints) for number, e in enumerate(encoders))


def _with_config_hint(path: Path, shape: TextEncoderShape, number: int, hints: YamlHints) -> TextEncoderShape:
    """The shape with heads, activation and epsilon of a transformers config.json, where there is one."""
    name = "text_encoder_config.json" if number == 0 else "text_encoder_2_config.json"
    own = path.with_name(f"{path.stem}.{name}")
    folder = hints.text_folders[number] if number < len(hints.text_folders) else None
    places = [own, *([folder / "config.json"] if folder else []), path.with_name(name)]
    for place in places:
        if not place.is_file():
            continue
        config = read_json(place)
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
