"""CLIP in plain torch: both towers, the preparation of pictures, token ids. No version of transformers matters.

Modules are named as in transformers' CLIPModel, so its tensors load as they are.

Precision. The picture tower's matrices, nearly all of its weights, may be float16 or bfloat16. What they multiply is
rounded to that just before, and what they give is float32 again: the stream that the blocks add to (whose few large
channels grow past float16's precision, if not its range), layer norms, modulation, features and scores. Within, the
products of attention and the softmax are float32 inside torch's fused kernels, and nothing exceeds float16's 65504.

Where. A frozen model's picture tower is on the device. Its text tower, which each prompt passes once, stays in main
memory as it lies in the file and computes in float32, a block's weights at a time (`in_float32`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spo.checkpoint.tensor_file import TensorFile
from spo.errors import SpoError
from spo.preference.placement import Placement
from spo.resting import Resting

TEXT_TOKENS = 77
_MATRICES = (".self_attn.", ".mlp.", ".patch_embedding.")  # of the picture tower: what may be in half precision
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_TOKENIZER_FOLDER = Path(__file__).parents[2] / "clip_tokenizer"


# ---------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class TowerShape:
    """One transformer. activation: "gelu" (OpenCLIP's towers, so ViT-H) or "quick_gelu" (OpenAI's)."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    activation: str = "gelu"
    norm_epsilon: float = 1e-5


@dataclass(frozen=True)
class ClipShape:
    """Both towers; image_px and patch_px are sides of squares, projection the width of the common features."""

    text: TowerShape
    vision: TowerShape
    vocabulary: int
    patch_px: int
    image_px: int
    projection: int


def clip_shape(
    shapes: Mapping[str, Sequence[int]], clip_config: Mapping[str, Any] | None = None, source: str = "the model"
) -> ClipShape:
    """Sizes of a CLIP from its tensors' shapes, named as in transformers' CLIPModel.

    clip_config  what shapes do not tell, as transformers' CLIPConfig.to_dict() has it: `num_attention_heads`,
                 `hidden_act` and `layer_norm_eps` in `text_config` and `vision_config`. Without it: 64 channels a head,
                 but 16 heads for a picture tower from 1024 wide on (ViT-L, H, g, G); GELU; 1e-5
    source       how errors call the model

    Raises SpoError for a missing or misshapen tensor.
    """

    def size(name: str, axis: int = 0) -> int:
        shape = shapes.get(name)
        if shape is None:
            raise SpoError(f'{source} is incomplete: the tensor "{name}" is missing.')
        if axis >= len(shape):
            raise SpoError(f'{source} is damaged: the tensor "{name}" has the shape {list(shape)}.')
        return shape[axis]

    def tower(part: str, default_heads: int) -> TowerShape:
        layers = 0
        while f"{part}_model.encoder.layers.{layers}.mlp.fc1.weight" in shapes:
            layers += 1
        first = f"{part}_model.encoder.layers.0.mlp.fc1.weight"
        config = (clip_config or {}).get(f"{part}_config") or {}
        heads = int(config.get("num_attention_heads", default_heads))
        activation = str(config.get("hidden_act", "gelu"))
        width = size(first, 1)
        if heads < 1 or width % heads:
            raise SpoError(
                f"{source} has a {part} tower {width} wide, which cannot have {heads} heads: "
                "say num_attention_heads in the metadata clip_config."
            )
        if activation not in ACTIVATIONS:
            raise SpoError(f'{source} has the activation "{activation}"; accepted are {" and ".join(ACTIVATIONS)}.')
        return TowerShape(width, size(first), layers, heads, activation, float(config.get("layer_norm_eps", 1e-5)))

    if (tokens := size("text_model.embeddings.position_embedding.weight")) != TEXT_TOKENS:
        raise SpoError(f"{source} reads prompts of {tokens} tokens; CLIP's {TEXT_TOKENS} are accepted.")
    vision_width = size("vision_model.encoder.layers.0.mlp.fc1.weight", 1)
    patch_px = size("vision_model.embeddings.patch_embedding.weight", 2)
    return ClipShape(
        text=tower("text", size("text_model.encoder.layers.0.mlp.fc1.weight", 1) // 64),
        vision=tower("vision", 16 if vision_width >= 1024 else vision_width // 64),
        vocabulary=size("text_model.embeddings.token_embedding.weight"),
        patch_px=patch_px,
        image_px=patch_px * math.isqrt(size("vision_model.embeddings.position_embedding.weight") - 1),
        projection=size("visual_projection.weight"),
    )


# ---------------------------------------------------------------------------------------------- the network


def in_float32(module: nn.Module, *inputs: Tensor) -> Tensor:
    """`module(*inputs)` computed in float32, whatever its weights are stored in; differentiable where they are."""
    if all(weight.dtype == torch.float32 for weight in module.parameters()):
        return module(*inputs)
    weights = {name: weight.float() for name, weight in module.named_parameters()}
    return torch.func.functional_call(module, weights, inputs)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "quick_gelu": _quick_gelu}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """[N, tokens, width] float32 -> the same, computed in the weights' precision."""
        x = x.to(self.q_proj.weight.dtype)
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2)).float()


class MLP(nn.Module):
    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, shape.width)
        self.activation = ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        """As `Attention`."""
        return self.fc2(self.activation(self.fc1(x.to(self.fc1.weight.dtype)))).float()


class Block(nn.Module):
    """A pre-norm block: causal in the text tower."""

    def __init__(self, shape: TowerShape, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.layer_norm1 = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)
        self.self_attn = Attention(shape.width, shape.heads)
        self.layer_norm2 = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal=self.causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, layers: Sequence[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TextEmbeddings(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(TEXT_TOKENS, width)


class TextTower(nn.Module):
    def __init__(self, shape: TowerShape, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(vocabulary, shape.width)
        self.encoder = Encoder([Block(shape, causal=True) for _ in range(shape.layers)])
        self.final_layer_norm = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        """[N, tokens] -> [N, width], the state at the first end token, which has the highest id."""
        _, x = self.states(ids)
        end = ids.argmax(-1)
        return in_float32(self.final_layer_norm, x[torch.arange(len(ids), device=ids.device), end])

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[N, tokens] -> [N, tokens, width] of every token before the last block and after it, float32, not normed."""
        positions = self.embeddings.position_embedding.weight[: ids.shape[1]]
        before = x = self.embeddings.token_embedding(ids).float() + positions.float()
        for block in self.encoder.layers:
            before, x = x, in_float32(block, x)
        return before, x


class VisionEmbeddings(nn.Module):
    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        width, patches = shape.vision.width, (shape.image_px // shape.patch_px) ** 2
        self.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, shape.patch_px, shape.patch_px, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, image_px, image_px] float32 -> [N, patches + 1, width] float32."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).float()
        patches = patches.flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """CLIP's picture tower."""

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        tower = shape.vision
        self.embeddings = VisionEmbeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)  # CLIP's own spelling
        self.encoder = Encoder([Block(tower, causal=False) for _ in range(tower.layers)])
        self.post_layernorm = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, image_px, image_px] prepared pixels -> [N, width]."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for block in self.encoder.layers:
            x = block(x)
        return self.post_layernorm(x[:, 0])


# ---------------------------------------------------------------------------------------------- pictures and prompts


def prepare_pictures(pictures: Tensor, image_px: int) -> Tensor:
    """[N, 3, height, width] in [-1, 1] -> [N, 3, image_px, image_px] float32, normalized for CLIP.

    As published: bicubic without antialiasing until the shorter side fits, the middle cut out, and only then clamped.
    """
    height, width = pictures.shape[-2:]
    scale = image_px / min(height, width)
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    pictures = functional.interpolate(pictures.float(), size=size, mode="bicubic", align_corners=False)
    top, left = (round((side - image_px) / 2) for side in size)
    return normalize((pictures[..., top : top + image_px, left : left + image_px] / 2 + 0.5).clamp(0, 1))


def normalize(pictures: Tensor) -> Tensor:
    """[..., 3, height, width] in [0, 1] -> the same by the means and deviations of CLIP's training pictures."""
    mean, std = (pictures.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pictures - mean) / std


def token_ids(prompts: Sequence[str]) -> Tensor:
    """[N, 77] int64 CLIP token ids: begin, the prompt (its first 75 tokens), end, and end tokens as padding."""
    return _tokenizer()(
        list(prompts), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
    ).input_ids


@cache
def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(_TOKENIZER_FOLDER))


def unit(features: Tensor) -> Tensor:
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


def known_features(
    prompts: Sequence[str], known: dict[str, Tensor], encode: Callable[[Sequence[str]], Tensor], per_call: int = 16
) -> Tensor:
    """[B, projection] features of prompts; those not in `known` are encoded, each once, and remembered there."""
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    for start in range(0, len(new), per_call):
        some = new[start : start + per_call]
        known.update(zip(some, encode(some), strict=True))
    return torch.stack([known[prompt] for prompt in prompts])


# ---------------------------------------------------------------------------------------------- files


def settle(
    model: nn.Module, tensors: Mapping[str, Tensor], place: Placement, stays: Callable[[str], bool]
) -> Resting | None:
    """Give a frozen model its weights: those of `stays` remain in main memory as they lie in the file (mapped, so that
    they take memory only once they are used, and may be given back), the others go where and to what `place` says.

    model    built on the meta device; tensors: by its names, all of them
    Returns what brings the weights to the device, where `place` lets them rest.

    The weights that go to the device are copies: what was read may be the mapped file itself. See the module's text for
    which of them stay float32.
    """
    weights = {}
    for name, value in tensors.items():
        if stays(name):
            weights[name] = value
        else:
            dtype = place.dtype if any(part in name for part in _MATRICES) else torch.float32
            weights[name] = value.to("cpu" if place.rests else place.device, dtype, copy=True).contiguous()
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    return Resting(model, place.device, lambda name: not stays(name)) if place.rests else None


def read_clip_config(file: TensorFile) -> dict[str, Any] | None:
    """CLIP's configuration (see `clip_shape`): the metadata `clip_config`, or the config.json beside the file.

    None when there is neither. A config.json of another model does not count. Raises SpoError for broken JSON.
    """
    beside = file.path.with_name("config.json")
    place, text = "metadata clip_config", file.metadata.get("clip_config")
    if text is None and beside.is_file():
        place, text = "config.json beside it", beside.read_text(encoding="utf-8", errors="replace")
    if text is None:
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise SpoError(f'"{file.path.name}" has a {place} that is not JSON ({error}).') from error
    return config if isinstance(config, dict) and "vision_config" in config else None


def check_tensors(model: nn.Module, shapes: Mapping[str, Sequence[int]], source: str, what: str) -> None:
    """Raises SpoError unless a file's tensors are exactly those of `model`, in name and shape.

    shapes  name as in `model` -> shape; source: how errors call the file; what: what it should be
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if missing := sorted(expected.keys() - shapes.keys()):
        raise SpoError(f'{source} is incomplete: it lacks {len(missing)} of {len(expected)} tensors: "{missing[0]}".')
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise SpoError(f'{source} is no {what}: it also holds "{unknown[0]}".')
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise SpoError(f'{source} is damaged: "{name}" has the shape {list(shapes[name])}, not {list(shape)}.')
