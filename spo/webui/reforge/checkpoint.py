"""The loaded checkpoint in reForge and Forge classic: what it is, and whether it can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from spo.errors import SpoError
from spo.webui.a1111.checkpoint import Checkpoint, other_left_loaded, swap_back
from spo.webui.a1111.queue import in_queue

LEVELS = 1000  # of the training schedule of SD1.5 and SDXL


def loaded_checkpoint() -> Checkpoint:
    """The loaded checkpoint. Raises SpoError for none, and for what cannot be sampled step by step; touches nothing."""
    from modules import sd_models, sd_unet

    model = sd_models.model_data.get_sd_model()
    if model is None:
        raise SpoError("No checkpoint is loaded; choose one at the top of the page.")
    info = getattr(model, "sd_checkpoint_info", None)
    title = getattr(info, "title", "the loaded checkpoint")
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if getattr(model, "is_sd3", False) or network is None or not hasattr(network, "input_blocks"):
        raise SpoError(f"{title} is not SD1.5 or SDXL, so it cannot be trained here; load another checkpoint.")
    if getattr(model, "is_sd2", False):
        raise SpoError(f"{title} is a Stable Diffusion 2 checkpoint; load an SD1.5 or SDXL one.")
    inputs = next(network.input_blocks[0].parameters()).shape[1]
    if inputs != 4:
        raise SpoError(f"{title} takes {inputs} channels (inpainting or editing); load a text-to-image checkpoint.")
    if _is_refiner(model):
        raise SpoError(f"{title} is an SDXL refiner; load the base checkpoint.")
    if sd_unet.current_unet is not None:
        raise SpoError('Another SD Unet (TensorRT or the like) is in use; set "SD Unet" to None in the settings.')
    return Checkpoint(
        model=model,
        info=info,
        name=getattr(info, "name_for_extra", ""),
        hash=getattr(info, "shorthash", "") or "",
        file=Path(getattr(info, "filename", "")),
        architecture=architecture(model),
        prediction_type=_prediction_type(model, title),
        low_memory="",  # the fork moves parts of it by itself, whatever the flag
    )


def chosen_checkpoint() -> Checkpoint:
    """`loaded_checkpoint`, after the chosen one was swapped back where another was left; waits for the queue then."""
    if other_left_loaded():
        with in_queue("SPO"):
            if other_left_loaded():
                swap_back()
    return loaded_checkpoint()


def architecture(model: Any) -> str:
    """The WebUI's model -> "sd15", "sdxl", or "" for another."""
    if any(getattr(model, name, False) for name in ("is_sd2", "is_sd3")):
        return ""
    return "sdxl" if getattr(model, "is_sdxl", False) else "sd15"


def alphas_cumprod(model: Any) -> Tensor:
    """[1000] the WebUI's model -> its training schedule, as its samplers see it."""
    return model.alphas_cumprod  # type: ignore[no-any-return]


def _is_refiner(model: Any) -> bool:
    """The refiner has one text encoder, OpenCLIP's; the base has CLIP's beside it."""
    return getattr(model, "is_sdxl", False) and not any(
        type(embedder).__name__.endswith("XL_L") for embedder in model.conditioner.embedders
    )


def _prediction_type(model: Any, title: str) -> str:
    """As the network is read, whatever the file's yaml says. SpoError for schedules other than SD1.5's and SDXL's."""
    from ldm_patched.modules import model_sampling

    sampling = model.forge_objects.unet.model.model_sampling
    kinds = {kind.__name__ for kind in type(sampling).__mro__}
    if "ModelSamplingDiscrete" not in kinds or not kinds & {"EPS", "V_PREDICTION"} or len(sampling.sigmas) != LEVELS:
        raise SpoError(f"{title} has another noise schedule than SD1.5 and SDXL; load another checkpoint.")
    return "v_prediction" if isinstance(sampling, model_sampling.V_PREDICTION) else "epsilon"


def refuse_training(checkpoint: Checkpoint) -> None:
    """Nothing is refused for the way in which the fork runs it: it moves weights and casts 8-bit ones by itself."""


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the loaded model by the names that they have in a checkpoint file; no copies."""
    model = checkpoint.model
    return {
        name.replace(".wrapped.", "."): tensor  # around the text encoders
        for name, tensor in model.state_dict().items()
    }
