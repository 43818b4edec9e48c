"""What a file of tensors is, told from their names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from spo.checkpoint.tensor_file import TensorFile, refuse

Architecture = Literal["sd15", "sdxl"]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX: Mapping[Architecture, str] = {
    "sd15": "cond_stage_model.transformer.",
    "sdxl": "conditioner.embedders.0.transformer.",
}
OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."

TITLE: Mapping[str, str] = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}


def architecture_of(file: TensorFile) -> Architecture:
    _refuse_other_kinds(file)
    names = file.tensors
    shape = names[f"{UNET_PREFIX}input_blocks.0.0.weight"].shape
    in_channels = shape[1] if len(shape) > 1 else 4
    is_xl = f"{UNET_PREFIX}label_emb.0.0.weight" in names

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
