"""What a file of tensors is, told from their names and shapes: the one table, for everybody who opens files.

Kinds of preference models have a table of their own, `preference.load.KINDS`, so that another one touches no file here;
who looks for one asks that table first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spo.checkpoint.tensor_file import TensorFile, is_pickle

Architecture = Literal["sd15", "sdxl"]
Family = Literal[
    "checkpoint", "other checkpoint", "network", "vae", "text encoder", "clip", "lora", "adapter", "embedding",
    "hypernetwork", "control", "upscaler", "unknown",
]  # fmt: skip

TITLE: Mapping[str, str] = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX: Mapping[Architecture, str] = {
    "sd15": "cond_stage_model.transformer.",
    "sdxl": "conditioner.embedders.0.transformer.",
}
OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."
_UNET_INPUT = f"{UNET_PREFIX}input_blocks.0.0.weight"


@dataclass(frozen=True)
class Kind:
    """What a file is.

    family        what code decides by. "checkpoint": one that can be trained; "other checkpoint": of another network or
                  for another task; "network": a diffusion network alone; "lora": one that can be read; "adapter": what
                  changes weights in another way, or changes another network
    text          what people read, with its article: "a LoHa file (LyCORIS)"
    architecture  of a checkpoint that can be trained
    """

    family: Family
    text: str
    architecture: Architecture | None = None


# Adapters first, since their names contain those of the modules that they change; then from the most to the least
# special. A pattern is looked for at any place of any tensor's name; "^" and "$" are the name's ends.
_ADAPTERS: tuple[tuple[str, str], ...] = (
    (r"\.hada_w", "a LoHa file (LyCORIS)"),
    (r"\.lokr_w", "a LoKr file (LyCORIS)"),
    (r"\.dora_scale|lora_magnitude_vector", "a DoRA file"),
    (r"\.oft_|^oft_", "an OFT file"),
    (r"\.on_input$", "an (IA)^3 file (LyCORIS)"),
    (r"\.[ab][12]\.weight$", "a GLoRA file (LyCORIS)"),
    (r"lora_mid", "a LoCon file with Tucker decomposition (LyCORIS)"),
    (r"^lora_controlnet", "a Control-LoRA"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "a file with whole differences of weights (LyCORIS)"),
    (r"^bundle_emb\.", "a LoRA with embeddings bundled into it"),
    (r"motion_modules[._]", "an AnimateDiff motion module or its LoRA"),
)
_LORA = r"(^|[._])(lora|lycoris)[._]"
_LORAS_ELSEWHERE: tuple[tuple[str, str], ...] = (
    (r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d", "a LoRA for Flux or a relative of it"),
    (r"joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn[._]", "a LoRA for Stable Diffusion 3 or a relative of it"),
    (r"^(base_model\.model\.)?(lora_)?(transformer|prior)[._]", "a LoRA for a transformer"),
    (r"^(lora_unet_|unet\.|diffusion_model\.)*(transformer_blocks|blocks|layers)[._]\d", "a LoRA for a transformer"),
)
_OTHERS: tuple[tuple[Family, str, str], ...] = (
    ("embedding", r"^(emb_params|clip_[lg]|string_to_param|<.*>)$", "a textual inversion embedding"),
    ("control", r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    ("control", r"^(control_model\.|controlnet_|input_hint_block\.)", "a ControlNet"),
    ("other checkpoint", r"joint_blocks\.0\.", "a Stable Diffusion 3 checkpoint"),
    ("other checkpoint", r"double_blocks\.0\.img_attn\.|single_transformer_blocks\.0\.", "a Flux checkpoint"),
    ("other checkpoint", r"^model\.diffusion_model\.", "a checkpoint of another kind of diffusion network"),
    ("network", r"^(double_blocks|single_blocks|transformer_blocks)\.", "a diffusion transformer alone"),
    ("network", r"^(unet\.)?(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)\.",
     "a UNet alone"),
    ("text encoder", r"^(cond_stage_model|conditioner)\.", "a text encoder alone"),
    ("vae", r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|down|up)", "a VAE"),
    ("vae", r"^((encoder|decoder)\.layers\.)?\d+\.conv\.\d+\.weight$", "a TAESD, a small VAE for previews"),
    ("hypernetwork", r"^\d+\.\d+\.", "a hypernetwork"),
    ("unknown", r"(^|\.)blip\.", "ImageReward, which is not supported"),
    ("clip", r"(^|\.)(vision_model\.|visual\.(transformer|conv1)\.)", "a CLIP"),
    ("text encoder", r"^(text_model|transformer|text_projection|token_embedding|embeddings\.token_embedding)\b"
                     r"|^encoder\.block\.0\.layer\.|^text_encoder", "a text encoder alone"),
    ("upscaler", r"(^|\.)(conv_first|RDB1|rdb1)\.", "an upscaler"),
)  # fmt: skip
_EMBEDDING_WIDTHS = (768, 1024, 1280)

# what the start of a pickle mentions, for those that are not loaded
_PICKLES: tuple[tuple[bytes, Family, str], ...] = (
    (b"string_to_param", "embedding", "a textual inversion embedding"),
    (b"layer_structure", "hypernetwork", "a hypernetwork"),
    (b"diffusion_model.", "checkpoint", "a checkpoint"),
    (b"lora_", "lora", "a LoRA"),
)


def kind_of(file: TensorFile) -> Kind:
    """What the file is; of the family "unknown" when nothing here fits."""
    names = "\n".join(file.tensors)

    def has(pattern: str) -> bool:
        return re.search(pattern, names, re.MULTILINE) is not None

    if not names:
        return Kind("unknown", "an empty file, without any tensor")
    for pattern, text in _ADAPTERS:
        if has(pattern):
            return Kind("adapter", text)
    if has(_LORA):
        return next(
            (Kind("adapter", text) for pattern, text in _LORAS_ELSEWHERE if has(pattern)), Kind("lora", "a LoRA")
        )
    if _UNET_INPUT in file.tensors:
        return _checkpoint_kind(file)
    for family, pattern, text in _OTHERS:
        if has(pattern):
            return Kind(family, text)
    widths = {entry.shape[-1] if entry.shape else 0 for entry in file.tensors.values()}
    if len(file.tensors) <= 2 and widths <= set(_EMBEDDING_WIDTHS):
        return Kind("embedding", "a textual inversion embedding")
    return Kind("unknown", f"something else (its first tensors: {', '.join(list(file.tensors)[:3])})")


def _checkpoint_kind(file: TensorFile) -> Kind:
    """Of a file with an LDM UNet: which Stable Diffusion it is, and for what."""

    def starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in file.tensors)

    if starts("edm_"):
        return Kind("other checkpoint", "an SDXL checkpoint with EDM preconditioning (Playground 2.5)")
    if any(".time_stack." in name for name in file.tensors):
        return Kind("other checkpoint", "a video checkpoint (Stable Video Diffusion)")
    if starts("cond_stage_model.roberta."):
        return Kind("other checkpoint", "an AltDiffusion checkpoint")
    shape = file.tensors[_UNET_INPUT].shape
    is_xl = starts(f"{UNET_PREFIX}label_emb.0.0.weight")
    widths = {
        entry.shape[1]
        for name, entry in file.tensors.items()
        if name.endswith(".attn2.to_k.weight") and len(entry.shape) == 2
    }
    if starts("cond_stage_model.model.", "embedder.model.", "depth_model."):  # SD2's, unCLIP's
        widths = {1024}
    if starts("conditioner.embedders.0.model."):
        widths = {1280}
    return unet_kind(is_xl, widths, shape[1] if len(shape) > 1 else 4)


def unet_kind(is_xl: bool, context_widths: Collection[int], in_channels: int) -> Kind:
    """What a Stable Diffusion UNet is for.

    is_xl           it takes SDXL's sizes and pooled text; context_widths: of the text features that its attention reads
    in_channels     4 for text to image; more: pictures or masks come with the latent
    """
    if 1024 in context_widths:
        variant = {9: "2.x inpainting", 5: "2.x depth", 7: "2.x upscaler"}.get(in_channels, "2.x")
        return Kind("other checkpoint", f"a Stable Diffusion {'2.1 unCLIP' if is_xl else variant} checkpoint")
    if is_xl and set(context_widths) == {1280}:
        return Kind("other checkpoint", "the SDXL refiner, which only finishes pictures")
    version = "SDXL" if is_xl else "SD 1.x"
    if in_channels != 4:
        task = {9: "inpainting ", 8: "instruct-pix2pix "}.get(in_channels, "")
        return Kind("other checkpoint", f"an {version} {task}checkpoint with {in_channels} input channels, not 4")
    if not context_widths:
        return Kind("other checkpoint", "a checkpoint without cross-attention, which cannot follow prompts")
    architecture: Architecture = "sdxl" if is_xl else "sd15"
    article = "an" if is_xl else "a"
    return Kind("checkpoint", f"{article} {TITLE[architecture]} checkpoint", architecture)


def kind_of_pickle(path: Path) -> Kind | None:
    """What a pickle seems to be, by the words at its start, without loading it; None when the file is no pickle."""
    try:
        with path.open("rb") as file:
            start = file.read(1 << 22)
    except OSError:
        return None
    if not is_pickle(start):
        return None
    seeming = (Kind(family, text) for words, family, text in _PICKLES if words in start)
    return next(seeming, Kind("unknown", "a file"))
