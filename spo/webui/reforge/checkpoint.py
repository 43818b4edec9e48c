"""The loaded checkpoint in reForge and Forge classic: what it is, and whether it can be trained."""

from __future__ import annotations

from typing import Any

from spo.errors import SpoError
from spo.webui.a1111.checkpoint import Checkpoint, checkpoint_of, other_left_loaded, put_chosen_back, swap_back

LEVELS = 1000  # of the training schedule of SD1.5 and SDXL


def loaded_checkpoint() -> Checkpoint:
    """As `a1111.loaded_checkpoint`. The fork moves parts of the model by itself, whatever the flag."""
    from modules import sd_models

    return checkpoint_of(sd_models.model_data.get_sd_model(), _is_refiner, _prediction_type)


def chosen_checkpoint() -> Checkpoint:
    """`loaded_checkpoint`, after the chosen one was swapped back where another was left; waits for the queue then."""
    put_chosen_back(other_left_loaded, swap_back)
    return loaded_checkpoint()


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
