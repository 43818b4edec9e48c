"""The step-aware preference model: a CLIP whose picture tower knows the timestep. Paper, section 3.3.

Each block of the picture tower is modulated by the embedded timestep (shift, scale and gate of its two halves, as in
DiT), and so is the final layer norm; the text tower is CLIP's own. Tensor names are those of the published checkpoints.

Deliberate differences from the published code; scores are the same:
- both towers are written here in plain torch, so that no version of transformers matters;
- a fresh model's modulation is neutral (shift 0, scale 0, gate 1), so that with CLIP's weights it *is* CLIP; in the
  published code all six biases of a block start at one. A checkpoint overwrites them;
- text features are computed once for each distinct prompt, not for each candidate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spo.errors import SpoError
from spo.preference.protocol import Candidates
from spo.tensor_file import TensorFile, read_tensors

TEXT_TOKENS = 77
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_TOKENIZER_FOLDER = Path(__file__).parents[1] / "clip_tokenizer"
_TIME_FREQUENCIES = 128
_PREFIX = "model."  # of every tensor in the published files


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
    """Sizes of a CLIP from its tensors' shapes, named as in `StepAwareCLIP.state_dict()`.

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
        told = (clip_config or {}).get(f"{part}_config") or {}
        heads = int(told.get("num_attention_heads", default_heads))
        activation = str(told.get("hidden_act", "gelu"))
        width = size(first, 1)
        if heads < 1 or width % heads:
            raise SpoError(
                f"{source} has a {part} tower {width} wide, which cannot have {heads} heads: "
                "say num_attention_heads in the metadata clip_config."
            )
        if activation not in _ACTIVATIONS:
            raise SpoError(f'{source} has the activation "{activation}"; accepted are {" and ".join(_ACTIVATIONS)}.')
        return TowerShape(width, size(first), layers, heads, activation, float(told.get("layer_norm_eps", 1e-5)))

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


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "quick_gelu": _quick_gelu}


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.mlp_width)
        self.fc2 = nn.Linear(shape.mlp_width, shape.width)
        self.activation = _ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class _Block(nn.Module):
    """A pre-norm block of the text tower; causal."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)
        self.self_attn = _Attention(shape.width, shape.heads)
        self.layer_norm2 = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)
        self.mlp = _MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal=True)
        return x + self.mlp(self.layer_norm2(x))


class _ModulatedBlock(_Block):
    """A block of the picture tower. DiT, "adaLN-Zero": shift, scale, gate of the attention, then of the MLP."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__(shape)
        self.adaLN_modulation = _modulation(shape.width, (0, 0, 1, 0, 0, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        modulation = self.adaLN_modulation(time)[:, None]
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        normed = self.layer_norm1(x) * (1 + scale_attention) + shift_attention
        x = x + gate_attention * self.self_attn(normed, causal=False)
        normed = self.layer_norm2(x) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.mlp(normed)


def _modulation(width: int, neutral: Sequence[float]) -> nn.Sequential:
    """Embedded timestep [N, width] -> [N, parts * width], at first the `neutral` value of each part at any timestep."""
    linear = nn.Linear(width, len(neutral) * width)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.copy_(torch.tensor(neutral).repeat_interleave(width))
    return nn.Sequential(nn.SiLU(), linear)


class _Encoder(nn.Module):
    def __init__(self, layers: Sequence[_Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class _TextEmbeddings(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(TEXT_TOKENS, width)


class _TextTower(nn.Module):
    def __init__(self, shape: TowerShape, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = _TextEmbeddings(vocabulary, shape.width)
        self.encoder = _Encoder([_Block(shape) for _ in range(shape.layers)])
        self.final_layer_norm = nn.LayerNorm(shape.width, eps=shape.norm_epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        """[N, tokens] -> [N, width], the state at the first end token, which has the highest id."""
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[: ids.shape[1]]
        for block in self.encoder.layers:
            x = block(x)
        end = ids.argmax(-1)
        return self.final_layer_norm(x[torch.arange(len(ids), device=ids.device), end])


class _VisionEmbeddings(nn.Module):
    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        width, patches = shape.vision.width, (shape.image_px // shape.patch_px) ** 2
        self.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, shape.patch_px, shape.patch_px, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight


class _VisionTower(nn.Module):
    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        tower = shape.vision
        self.embeddings = _VisionEmbeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)  # CLIP's own spelling
        self.encoder = _Encoder([_ModulatedBlock(tower) for _ in range(tower.layers)])
        self.post_layernorm = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
        self.adaLN_modulation = _modulation(tower.width, (0, 0))

    def forward(self, pixels: Tensor, time: Tensor) -> Tensor:
        """[N, 3, image_px, image_px] prepared pixels and [N, width] embedded timesteps -> [N, width]."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for block in self.encoder.layers:
            x = block(x, time)
        shift, scale = self.adaLN_modulation(time).chunk(2, -1)
        return self.post_layernorm(x[:, 0]) * (1 + scale) + shift


class _TimeEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = nn.Linear(2 * _TIME_FREQUENCIES, width), nn.Linear(width, width)
        for linear in (first, second):
            nn.init.normal_(linear.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, timesteps: Tensor) -> Tensor:
        """[N] timesteps -> [N, width]: cosines, then sines, of frequencies falling from 1 to nearly 1 / 10,000."""
        index = torch.arange(_TIME_FREQUENCIES, device=timesteps.device, dtype=torch.float32)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * index / _TIME_FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(next(self.parameters()).dtype))


class StepAwareCLIP(nn.Module):
    """The `PreferenceModel` of the paper. Build it with `read_step_aware_clip`, or fresh from a `ClipShape`.

    name               what the interface and the file metadata call it
    pictures_per_call  how many pictures one pass of the network takes in `score`
    """

    needs_pixels = True

    def __init__(self, shape: ClipShape, name: str = "step-aware CLIP", pictures_per_call: int = 16) -> None:
        super().__init__()
        self.shape, self.name, self.pictures_per_call = shape, name, pictures_per_call
        self.text_model = _TextTower(shape.text, shape.vocabulary)
        self.vision_model = _VisionTower(shape)
        self.text_projection = nn.Linear(shape.text.width, shape.projection, bias=False)
        self.visual_projection = nn.Linear(shape.vision.width, shape.projection, bias=False)
        self.t_embedder = _TimeEmbedder(shape.vision.width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._known_texts: dict[str, Tensor] = {}

    def image_features(self, pictures: Tensor, timesteps: Tensor) -> Tensor:
        """[N, projection] float32 features of unit length, differentiable.

        pictures   [N, 3, height, width] in [-1, 1], any size; prepared by `prepare_pictures`
        timesteps  [N] 0 ... 999, may be fractional
        """
        weight = self.visual_projection.weight
        with _without_autocast(weight.device):
            prepared = prepare_pictures(pictures.to(weight.device), self.shape.image_px).to(weight.dtype)
            time = self.t_embedder(timesteps.to(weight.device))
            return _unit(self.visual_projection(self.vision_model(prepared, time)))

    def text_features(self, ids: Tensor) -> Tensor:
        """[N, projection] float32 features of unit length of [N, 77] token ids (see `token_ids`), differentiable."""
        weight = self.text_projection.weight
        if weight.requires_grad:  # about to be trained: what is known will be out of date
            self._known_texts.clear()
        with _without_autocast(weight.device):
            return _unit(self.text_projection(self.text_model(ids.to(weight.device))))

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32 on the candidates' device, cosine with the prompt times logit scale; see `PreferenceModel`."""
        pixels = candidates.pixels()
        if len(prompts) != pixels.shape[1]:
            raise ValueError(f"{len(prompts)} prompts for {pixels.shape[1]} images")
        parts = []
        for chunk in pixels.flatten(0, 1).split(self.pictures_per_call):
            timesteps = torch.full((len(chunk),), candidates.timestep, device=chunk.device)
            parts.append(self.image_features(chunk, timesteps))
        pictures = torch.cat(parts).unflatten(0, pixels.shape[:2])
        scores = self.logit_scale.float().exp() * (pictures * self._prompt_features(prompts)).sum(-1)
        return scores.to(candidates.x.device)

    def _prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """[B, projection]; each distinct prompt once for as long as the text tower is frozen."""
        known = {} if self.text_projection.weight.requires_grad else self._known_texts
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for start in range(0, len(new), self.pictures_per_call):
            some = new[start : start + self.pictures_per_call]
            known.update(zip(some, self.text_features(token_ids(some)), strict=True))
        return torch.stack([known[prompt] for prompt in prompts]).to(self.text_projection.weight.device)


def prepare_pictures(pictures: Tensor, image_px: int) -> Tensor:
    """[N, 3, height, width] in [-1, 1] -> [N, 3, image_px, image_px] float32, normalized for CLIP.

    As published: bicubic without antialiasing until the shorter side fits, the middle cut out, and only then clamped.
    """
    height, width = pictures.shape[-2:]
    scale = image_px / min(height, width)
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    pictures = functional.interpolate(pictures.float(), size=size, mode="bicubic", align_corners=False)
    top, left = (round((side - image_px) / 2) for side in size)
    pictures = (pictures[..., top : top + image_px, left : left + image_px] / 2 + 0.5).clamp(0, 1)
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


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The WebUI samples under autocast; this model's precision is its own."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


# ---------------------------------------------------------------------------------------------- files


def is_step_aware_clip(file: TensorFile) -> bool:
    """Whether the file's tensors are named like those of a picture tower with time modulation."""
    return any("vision_model." in name and ".adaLN_modulation." in name for name in file.tensors)


def read_step_aware_clip(
    file: TensorFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    clip_config: Mapping[str, Any] | None = None,
) -> StepAwareCLIP:
    """The frozen model in a file of the published layout, named after the file; `logit_scale` stays float32.

    clip_config  see `clip_shape`; default: the file's metadata `clip_config` (JSON), if it has that

    Raises SpoError for missing, unknown or misshapen tensors, and for a precision that the device cannot compute in.
    """
    source = f'"{file.path.name}"'
    _check_precision(torch.device(device), dtype)
    prefix = _PREFIX if f"{_PREFIX}logit_scale" in file.tensors else ""
    names = {  # older versions of transformers stored the positions 0, 1, 2, ... as well
        name.removeprefix(prefix): name for name in file.tensors if not name.endswith(".position_ids")
    }
    shapes = {ours: file.tensors[name].shape for ours, name in names.items()}
    if clip_config is None and "clip_config" in file.metadata:
        try:
            clip_config = json.loads(file.metadata["clip_config"])
        except ValueError as error:
            raise SpoError(f"{source} has metadata clip_config that is not JSON ({error}).") from error
    with torch.device("meta"):
        model = StepAwareCLIP(clip_shape(shapes, clip_config, source), file.path.stem)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if missing := sorted(expected.keys() - shapes.keys()):
        raise SpoError(f'{source} is incomplete: it lacks {len(missing)} of {len(expected)} tensors: "{missing[0]}".')
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise SpoError(f'{source} is no step-aware CLIP of the published layout: it also holds "{unknown[0]}".')
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise SpoError(f'{source} is damaged: "{name}" has the shape {list(shapes[name])}, not {list(shape)}.')
    tensors = read_tensors(file, names.values())
    weights = {  # copies: what was read may be the mapped file itself
        ours: tensors[name].to(device, torch.float32 if ours == "logit_scale" else dtype, copy=True)
        for ours, name in names.items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def _check_precision(device: torch.device, dtype: torch.dtype) -> None:
    one = torch.ones(1, 1, 1, 1, device=device, dtype=dtype)
    try:
        functional.layer_norm(functional.conv2d(one, one) @ one, (1,))
    except RuntimeError as error:
        name = str(dtype).removeprefix("torch.")
        raise SpoError(f"{name} does not work on {device} here ({error}); use preference_precision float32.") from error
