"""The step-aware preference model: a CLIP whose picture tower knows the timestep. Paper, section 3.3.

Each block of the picture tower is modulated by the embedded timestep (shift, scale and gate of its two halves, as in
DiT), and so is the final layer norm; the text tower is CLIP's own. Tensor names are those of the published checkpoints.

Deliberate differences from the published code; scores are the same:
- both towers are written here in plain torch, so that no version of transformers matters;
- a fresh model's modulation is neutral (shift 0, scale 0, gate 1), so that with CLIP's weights it *is* CLIP; in the
  published code all six biases of a block start at one. A checkpoint overwrites them;
- text features are computed once for each distinct prompt, and the modulation once for each timestep, not for each
  candidate; both on the CPU in float32, so that only the picture tower's 0.63 of 1.31 billion parameters need a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo.algorithm.preference import Candidates
from spo.checkpoint.tensor_file import TensorFile, read_tensors
from spo.files import write_whole
from spo.preference.clip.towers import (
    Block,
    ClipShape,
    Encoder,
    TextTower,
    TowerShape,
    VisionEmbeddings,
    check_tensors,
    clip_shape,
    in_float32,
    known_features,
    prepare_pictures,
    read_clip_config,
    settle,
    token_ids,
    unit,
)
from spo.preference.placement import ON_CPU, Placement, without_autocast
from spo.resting import Resting

_TIME_FREQUENCIES = 128
_KNOWN_TIMES = 256  # timesteps whose modulation is remembered, 1 MB each in ViT-H
_PREFIX = "model."  # of every tensor in the published files


# ---------------------------------------------------------------------------------------------- the network


class _ModulatedBlock(Block):
    """A block of the picture tower. DiT, "adaLN-Zero": shift, scale, gate of the attention, then of the MLP."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__(shape, causal=False)
        self.adaLN_modulation = _modulation(shape.width, (0, 0, 1, 0, 0, 1))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:  # type: ignore[override]
        """[N, tokens, width] and [N or 1, 6 * width], what `adaLN_modulation` makes of the timestep; all float32."""
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation[:, None].chunk(
            6, -1
        )
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


class _ModulatedVisionTower(nn.Module):
    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        tower = shape.vision
        self.embeddings = VisionEmbeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)  # CLIP's own spelling
        self.encoder = Encoder([_ModulatedBlock(tower) for _ in range(tower.layers)])
        self.post_layernorm = nn.LayerNorm(tower.width, eps=tower.norm_epsilon)
        self.adaLN_modulation = _modulation(tower.width, (0, 0))

    def modulation(self, time: Tensor) -> list[Tensor]:
        """[N, width] embedded timesteps -> what the blocks and the last norm make of them; float32, on its device."""
        layers = [*self.encoder.layers, self]
        return [in_float32(layer.adaLN_modulation, time) for layer in layers]  # type: ignore[arg-type]

    def forward(self, pixels: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """[N, 3, image_px, image_px] prepared pixels and `modulation` of N timesteps, or of one -> [N, width]."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for block, of_block in zip(self.encoder.layers, modulation, strict=False):
            x = block(x, of_block)
        shift, scale = modulation[-1].chunk(2, -1)
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
    needs_denoised = True

    def __init__(self, shape: ClipShape, name: str = "step-aware CLIP", pictures_per_call: int = 16) -> None:
        super().__init__()
        self.shape, self.name, self.pictures_per_call = shape, name, pictures_per_call
        self.text_model = TextTower(shape.text, shape.vocabulary)
        self.vision_model = _ModulatedVisionTower(shape)
        self.text_projection = nn.Linear(shape.text.width, shape.projection, bias=False)
        self.visual_projection = nn.Linear(shape.vision.width, shape.projection, bias=False)
        self.t_embedder = _TimeEmbedder(shape.vision.width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.resting: Resting | None = None
        self._known_texts: dict[str, Tensor] = {}
        self._known_times: dict[float, list[Tensor]] = {}

    def image_features(self, pictures: Tensor, timesteps: Tensor) -> Tensor:
        """[N, projection] float32 features of unit length, differentiable.

        pictures   [N, 3, height, width] in [-1, 1], any size; prepared by `prepare_pictures`
        timesteps  [N] 0 ... 999, may be fractional
        """
        return self._image_features(pictures, self._modulation(timesteps))

    def text_features(self, ids: Tensor) -> Tensor:
        """[N, projection] float32 features of unit length of [N, 77] token ids (see `token_ids`), differentiable."""
        weight = self.text_projection.weight
        if weight.requires_grad:  # about to be trained: what is known will be out of date
            self._known_texts.clear()
        with without_autocast(weight.device):
            return unit(in_float32(self.text_projection, self.text_model(ids.to(weight.device))))

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32 on the candidates' device, cosine with the prompt times logit scale; see `PreferenceModel`."""
        pixels = candidates.pixels()
        if len(prompts) != pixels.shape[1]:
            raise ValueError(f"{len(prompts)} prompts for {pixels.shape[1]} images")
        texts = self._prompt_features(prompts)
        with self.resting.awake() if self.resting is not None else nullcontext():
            modulation = self._modulation_at(candidates.timestep)
            chunks = pixels.flatten(0, 1).split(self.pictures_per_call)
            pictures = torch.cat([self._image_features(chunk, modulation) for chunk in chunks])
            scale = self.logit_scale.float().exp()
            scores = scale * (pictures.unflatten(0, pixels.shape[:2]) * texts.to(pictures.device)).sum(-1)
        return scores.to(candidates.x.device)

    def training_bytes(self, *, train_text: bool = True, moment_bytes: int = 4) -> int:
        """What training it takes in float32: weights, and of those that learn gradients and AdamW's two moments.

        moment_bytes  of a moment of one weight; 1 with 8-bit moments

        Beside that come the activations of a pass and the diffusion model.
        """
        frozen = () if train_text else ("text_model.", "text_projection.")
        return sum(
            value.numel() * (4 if name.startswith(frozen) else 8 + 2 * moment_bytes)
            for name, value in self.named_parameters()
        )  # fmt: skip

    def _image_features(self, pictures: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        device = self.visual_projection.weight.device
        with without_autocast(device):
            prepared = prepare_pictures(pictures.to(device), self.shape.image_px)
            features = self.vision_model(prepared, [value.to(device) for value in modulation])
            return unit(self.visual_projection(features))

    def _modulation(self, timesteps: Tensor) -> list[Tensor]:
        """Of [N] timesteps, where the weights that make it are: a frozen model's stay in main memory."""
        weight = next(self.t_embedder.parameters())
        if weight.requires_grad:  # as with texts
            self._known_times.clear()
        with without_autocast(weight.device):
            return self.vision_model.modulation(in_float32(self.t_embedder, timesteps.to(weight.device)))

    def _modulation_at(self, timestep: float) -> list[Tensor]:
        """Of one timestep, on the picture tower's device. A ladder has few of them, and their modulation, a quarter of
        the model's weights, is the same for every picture: it is computed once for each."""
        known = {} if next(self.t_embedder.parameters()).requires_grad else self._known_times
        if timestep not in known:
            if len(known) >= _KNOWN_TIMES:
                known.clear()
            device = self.visual_projection.weight.device
            known[timestep] = [value.to(device) for value in self._modulation(torch.tensor([timestep]))]
        return known[timestep]

    def _prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """[B, projection]; each distinct prompt once for as long as the text tower is frozen."""
        known = {} if self.text_projection.weight.requires_grad else self._known_texts
        return known_features(prompts, known, lambda some: self.text_features(token_ids(some)))


# ---------------------------------------------------------------------------------------------- files


def is_step_aware_clip(file: TensorFile) -> bool:
    """Whether the file's tensors are named like those of a picture tower with time modulation."""
    return any("vision_model." in name and ".adaLN_modulation." in name for name in file.tensors)


def read_step_aware_clip(
    file: TensorFile, name: str, place: Placement | None = None, *, clip_config: Mapping[str, Any] | None = None
) -> StepAwareCLIP:
    """The frozen model in a file of the published layout; `logit_scale` stays float32.

    place        of the picture tower. The text tower and the weights of the modulation, half of the model, are used
                 once for each prompt and timestep: they stay in main memory, in the file's precision, mapped from the
                 file where they can be, and compute in float32. None: a copy of everything on the CPU in float32, as
                 training needs it
    clip_config  see `clip_shape`; default: the file's metadata `clip_config` (JSON), if it has that

    Raises SpoError for missing, unknown or misshapen tensors.
    """
    source = f'"{file.path.name}"'
    prefix = _PREFIX if f"{_PREFIX}logit_scale" in file.tensors else ""
    names = {  # older versions of transformers stored the positions 0, 1, 2, ... as well
        theirs.removeprefix(prefix): theirs for theirs in file.tensors if not theirs.endswith(".position_ids")
    }
    shapes = {ours: file.tensors[theirs].shape for ours, theirs in names.items()}
    with torch.device("meta"):
        model = StepAwareCLIP(clip_shape(shapes, clip_config or read_clip_config(file), source), name)
    check_tensors(model, shapes, source, "step-aware CLIP of the published layout")
    read = read_tensors(file, names.values())
    tensors = {ours: read[theirs] for ours, theirs in names.items()}
    stays = _once_a_prompt_or_step if place else lambda name: False
    model.resting = settle(model, tensors, place or ON_CPU, stays)
    return model


def _once_a_prompt_or_step(name: str) -> bool:
    return name.startswith(("text_model.", "text_projection.", "t_embedder.")) or ".adaLN_modulation." in name


def save_step_aware_clip(
    model: StepAwareCLIP, path: Path, facts: Mapping[str, str], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write the model in the published names, whole or not at all, with `clip_config` and `facts` as metadata.

    dtype  of the weights in the file; `logit_scale` stays float32
    """
    from safetensors.torch import save_file

    towers = {"text_config": model.shape.text, "vision_config": model.shape.vision}
    config = {
        name: {"num_attention_heads": shape.heads, "hidden_act": shape.activation, "layer_norm_eps": shape.norm_epsilon}
        for name, shape in towers.items()
    }
    tensors = {
        f"{_PREFIX}{name}": value.detach().to("cpu", torch.float32 if name == "logit_scale" else dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    metadata = {"clip_config": json.dumps(config), **facts}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))
