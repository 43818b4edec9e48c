"""Preference models without time: PickScore, HPS v2 and v2.1, LAION's aesthetic scores. All from local files.

They judge finished pictures; as step-wise scorers they see predictions that they were not trained on (paper, table of
scorers: below the untrained checkpoint). All stand on CLIP, in plain torch (`towers`), from files in transformers' or
OpenCLIP's layout.

Deliberate differences from the published scorers:
- pictures arrive as float tensors, so the resize is torch's antialiased bicubic and nothing is rounded to 8 bits in
  between; against PIL's resize of the 8-bit picture that is less than 0.01 of the 0 ... 1 range a value on smooth
  pictures and 0.02 on noise (tests/preference/clip/test_scores.py measures it);
- HPS is multiplied by its logit scale (100), which its own code leaves out: so differences are the log-odds that it
  was trained with, as PickScore's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from spo.algorithm.preference import Candidates
from spo.checkpoint.tensor_file import TensorFile, read_tensors
from spo.errors import SpoError
from spo.preference.clip.towers import (
    ClipShape,
    TextTower,
    VisionTower,
    check_tensors,
    clip_shape,
    in_float32,
    known_features,
    normalize,
    read_clip_config,
    settle,
    token_ids,
    unit,
)
from spo.preference.pickles import open_model_file
from spo.preference.placement import Placement, without_autocast
from spo.resting import Resting

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_OPENAI_NAME = "clip-vit-large-patch14"
_QUICK_GELU = {"text_config": {"hidden_act": "quick_gelu"}, "vision_config": {"hidden_act": "quick_gelu"}}


# ---------------------------------------------------------------------------------------------- pictures


def shorter_side(pictures: Tensor, image_px: int) -> Tensor:
    """As PickScore and OpenAI's CLIP see pictures: the shorter side fits, the middle is cut out.

    [N, 3, height, width] in [-1, 1] -> [N, 3, image_px, image_px] float32, normalized for CLIP; bicubic, antialiased.
    """
    height, width = pictures.shape[-2:]
    short = min(height, width)
    size = (image_px * height // short, image_px * width // short)
    pictures = _resize(pictures, size)
    top, left = ((side - image_px) // 2 for side in size)
    return normalize(pictures[..., top : top + image_px, left : left + image_px])


def longer_side(pictures: Tensor, image_px: int) -> Tensor:
    """As HPS sees pictures: the longer side fits, the rest is black. Shapes as in `shorter_side`."""
    height, width = pictures.shape[-2:]
    scale = image_px / max(height, width)
    pictures = _resize(pictures, (round(height * scale), round(width * scale)))
    rows, columns = (image_px - side for side in pictures.shape[-2:])
    around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return normalize(functional.pad(pictures, around))


def _resize(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """[-1, 1] -> [0, 1] at another size."""
    pictures = pictures.float().clamp(-1, 1) / 2 + 0.5
    if tuple(pictures.shape[-2:]) == size:
        return pictures
    return functional.interpolate(pictures, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


# ---------------------------------------------------------------------------------------------- the networks


class CLIP(nn.Module):
    """CLIP of any size, frozen. Tensors are named as in transformers' CLIPModel."""

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        self.shape = shape
        self.text_model = TextTower(shape.text, shape.vocabulary)
        self.vision_model = VisionTower(shape)
        self.text_projection = nn.Linear(shape.text.width, shape.projection, bias=False)
        self.visual_projection = nn.Linear(shape.vision.width, shape.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.resting: Resting | None = None

    def awake(self) -> AbstractContextManager[None]:
        """Within, the picture tower is where it computes."""
        return self.resting.awake() if self.resting is not None else nullcontext()

    def image_features(self, prepared: Tensor) -> Tensor:
        """[N, projection] float32 features of unit length of [N, 3, image_px, image_px] prepared pictures."""
        device = self.visual_projection.weight.device
        with without_autocast(device):
            return unit(self.visual_projection(self.vision_model(prepared.to(device))))

    def text_features(self, ids: Tensor) -> Tensor:
        """[N, projection] float32 features of unit length of [N, 77] token ids (see `token_ids`)."""
        weight = self.text_projection.weight
        with without_autocast(weight.device):
            return unit(in_float32(self.text_projection, self.text_model(ids.to(weight.device))))


def _features(
    clip: CLIP, candidates: Candidates, prepare: Callable[[Tensor, int], Tensor], pictures_per_call: int
) -> Tensor:
    """[K, B, projection] float32 features of the decoded candidates."""
    pixels = candidates.pixels()
    with clip.awake():
        parts = [
            clip.image_features(prepare(chunk.to(clip.logit_scale.device), clip.shape.image_px))
            for chunk in pixels.flatten(0, 1).split(pictures_per_call)
        ]
    return torch.cat(parts).unflatten(0, pixels.shape[:2])


class ClipScore:
    """A `PreferenceModel`: cosine of picture and prompt times the logit scale, so PickScore and HPS. No time.

    name  what the interface and the file metadata call it
    """

    needs_pixels = True
    needs_denoised = True

    def __init__(
        self, clip: CLIP, name: str, prepare: Callable[[Tensor, int], Tensor], pictures_per_call: int = 16
    ) -> None:
        self.name, self.clip, self.prepare, self.pictures_per_call = name, clip, prepare, pictures_per_call
        self._known_texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32 on the candidates' device; see `PreferenceModel`."""
        pictures = _features(self.clip, candidates, self.prepare, self.pictures_per_call)
        if len(prompts) != pictures.shape[1]:
            raise ValueError(f"{len(prompts)} prompts for {pictures.shape[1]} images")
        texts = known_features(prompts, self._known_texts, lambda some: self.clip.text_features(token_ids(some)))
        scores = self.clip.logit_scale.exp().to(pictures.device) * (pictures * texts.to(pictures.device)).sum(-1)
        return scores.to(candidates.x.device)


class AestheticScore:
    """A `PreferenceModel`: LAION's mean rating, about 1 to 10, from CLIP ViT-L/14's features; no prompt, no time.

    Differences are not log-odds but points of a rating: in a `mix` give its deviation, alone lower the threshold.
    """

    needs_pixels = True
    needs_denoised = True

    def __init__(self, clip: CLIP, head: nn.Sequential, name: str, pictures_per_call: int = 16) -> None:
        self.name, self.clip, self.head, self.pictures_per_call = name, clip, head, pictures_per_call

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32 on the candidates' device; see `PreferenceModel`. The prompts do not matter."""
        with without_autocast(self.clip.logit_scale.device):
            pictures = _features(self.clip, candidates, shorter_side, self.pictures_per_call)
            return self.head(pictures)[..., 0].to(candidates.x.device)


# ---------------------------------------------------------------------------------------------- files


def is_plain_clip(file: TensorFile) -> bool:
    """Whether the file holds both towers of a CLIP without time, in transformers' or OpenCLIP's names."""
    names = file.tensors
    ours = {"logit_scale", "visual_projection.weight", "text_projection.weight"} <= names.keys()
    timed = any(".adaLN_modulation." in name for name in names)
    return (ours or _is_open_clip(file)) and not timed


def is_aesthetic_head(file: TensorFile) -> bool:
    """Whether the file holds LAION's linear head or its MLP: linear layers from CLIP features to one number."""
    layers = _head_layers(file)
    return bool(layers) and set(file.tensors) == {
        name for layer in layers for name in (f"{layer}weight", f"{layer}bias")
    }


def read_clip_score(file: TensorFile, name: str, place: Placement) -> ClipScore:
    """PickScore (transformers' layout) or HPS (OpenCLIP's) from its file.

    The layout tells how pictures are prepared: `shorter_side` for transformers', `longer_side` for OpenCLIP's.
    Raises SpoError for what is missing, damaged or something else.
    """
    prepare = longer_side if _is_open_clip(file) else shorter_side
    return ClipScore(read_clip(file, place), name, prepare)


def read_aesthetic_score(
    file: TensorFile, name: str, place: Placement, *, clip_path: Path | None = None
) -> AestheticScore:
    """LAION's linear or MLP head, over the CLIP ViT-L/14 of OpenAI. The head computes in float32.

    clip_path  file or folder of that CLIP; default: what lies beside the head and is named like openai's repository
               (clip-vit-large-patch14) or ViT-L-14

    Raises SpoError for what is missing, damaged, something else, or a CLIP of another width.
    """
    if not is_aesthetic_head(file):
        raise SpoError(f'"{file.path.name}" is not an aesthetic head: linear layers down to one number are needed.')
    tensors = read_tensors(file, file.tensors)
    layers = [
        nn.utils.skip_init(nn.Linear, *reversed(file.tensors[f"{layer}weight"].shape)) for layer in _head_layers(file)
    ]
    for linear, layer in zip(layers, _head_layers(file), strict=True):
        linear.load_state_dict({part: tensors[f"{layer}{part}"].float() for part in ("weight", "bias")})
    clip_file = open_model_file(weights_in(clip_path or _clip_beside(file.path)))
    clip = read_clip(clip_file, place, default_config=_QUICK_GELU)
    if layers[0].in_features != clip.shape.projection:
        raise SpoError(
            f'"{file.path.name}" reads CLIP features {layers[0].in_features} wide, those of "{clip_file.path}" are '
            f"{clip.shape.projection} wide; OpenAI's ViT-L/14 (openai/{_OPENAI_NAME}) is needed."
        )
    head = nn.Sequential(*layers)  # dropout between them is for training only
    head.to(place.device).eval().requires_grad_(False)
    return AestheticScore(clip, head, name)


def read_clip(file: TensorFile, place: Placement, *, default_config: Mapping[str, object] | None = None) -> CLIP:
    """The frozen CLIP in a file of either layout; `logit_scale` stays float32.

    place           of the picture tower; the text tower, which each prompt passes once, stays in main memory
    default_config  see `clip_shape`; where neither metadata nor a config.json beside the file tell it

    Raises SpoError for missing, unknown or misshapen tensors.
    """
    source = f'"{file.path.name}"'
    tensors = clip_tensors(file)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    with torch.device("meta"):
        model = CLIP(clip_shape(shapes, read_clip_config(file) or default_config, source))
    check_tensors(model, shapes, source, "CLIP without time")
    model.resting = settle(model, tensors, place, lambda name: name.startswith(("text_model.", "text_projection.")))
    return model


def clip_tensors(file: TensorFile) -> dict[str, Tensor]:
    """A CLIP file's tensors by transformers' names, in the file's dtypes; OpenCLIP's are renamed, split, transposed."""
    wanted = [name for name in file.tensors if not name.endswith((".position_ids", "attn_mask"))]
    tensors = read_tensors(file, wanted)
    if not _is_open_clip(file):
        return tensors
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        renamed.update(_from_open_clip(name.removeprefix("module."), value))
    return renamed


def weights_in(path: Path) -> Path:
    """The file of weights that a path means: itself, or of a folder the first of `WEIGHT_NAMES` that is there."""
    if not path.is_dir():
        return path
    for name in WEIGHT_NAMES:
        if (path / name).is_file():
            return path / name
    raise SpoError(
        f'the folder "{path}" holds no CLIP: {", ".join(WEIGHT_NAMES[:-1])} or {WEIGHT_NAMES[-1]} is needed.'
    )


def _is_open_clip(file: TensorFile) -> bool:
    return any(f"{prefix}visual.conv1.weight" in file.tensors for prefix in ("", "module."))


_OPEN_CLIP_TOPS = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
_OPEN_CLIP_PARTS = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("ln_final.", "text_model.final_layer_norm."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
)


def _from_open_clip(name: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor of OpenCLIP's layout by transformers' names: attention's three projections come in one."""
    if name in _OPEN_CLIP_TOPS:
        return {_OPEN_CLIP_TOPS[name]: value}
    if name in ("text_projection", "visual.proj"):
        return {"text_projection.weight" if name == "text_projection" else "visual_projection.weight": value.T}
    for theirs, ours in _OPEN_CLIP_PARTS:
        if theirs.startswith(".") or name.startswith(theirs):
            name = name.replace(theirs, ours)
    if ".attn.in_proj_" not in name:
        return {name: value}
    layer, kind = name.split(".attn.in_proj_")
    return {f"{layer}.self_attn.{part}_proj.{kind}": piece for part, piece in zip("qkv", value.chunk(3), strict=True)}


def _head_layers(file: TensorFile) -> list[str]:
    """Prefixes of a head's linear layers in order, when each takes what the one before gives and the last gives one."""
    shapes = {name.removesuffix("weight"): e.shape for name, e in file.tensors.items() if name.endswith("weight")}
    if not shapes or any(len(shape) != 2 for shape in shapes.values()):
        return []
    order = sorted(shapes, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    fits = all(shapes[a][0] == shapes[b][1] for a, b in pairwise(order))
    biases = all(f"{name}bias" in file.tensors for name in order)
    return order if fits and biases and shapes[order[-1]][0] == 1 else []


def _clip_beside(head: Path) -> Path:
    spellings = (_OPENAI_NAME, "vit-l-14", "vit_l_14")
    for path in sorted(head.parent.iterdir()):
        known = path.is_dir() or path.suffix.lower() in (".safetensors", ".bin", ".pt", ".pth")
        if path != head and known and any(spelling in path.name.lower() for spelling in spellings):
            try:
                if is_plain_clip(open_model_file(weights_in(path))):
                    return path
            except SpoError:
                continue
    place = head.parent.absolute() / f"{_OPENAI_NAME}.safetensors"
    raise SpoError(
        f'"{head.name}" needs CLIP ViT-L/14 beside it: put model.safetensors of huggingface.co/openai/{_OPENAI_NAME} '
        f'there as "{place}".'
    )
