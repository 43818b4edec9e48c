"""The loaded checkpoint: what it is, whether it can be trained, and loading another one.

A Forge loads lazily: the page sets what is to be loaded (`forge_loading_parameters`), the next generation loads it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo.checkpoint.kinds import kind_of
from spo.checkpoint.tensor_file import open_tensor_file
from spo.errors import SpoError
from spo.webui import a1111
from spo.webui.a1111.checkpoint import choose, listed, put_chosen_back
from spo.webui.a1111.options import option

_LDM_TEXT = {
    "sd15": {"clip_l.": "cond_stage_model."},
    "sdxl": {"clip_l.": "conditioner.embedders.0.", "clip_g.": "conditioner.embedders.1.model."},
}


class Checkpoint(a1111.Checkpoint):
    """A checkpoint as Forge has loaded it, see `a1111.Checkpoint`; low_memory is "", as Forge moves what it needs."""

    @property
    def network(self) -> nn.Module:
        """The UNet, with modules called as in ldm and sgm."""
        return self.model.forge_objects.unet.model.diffusion_model  # type: ignore[no-any-return]

    @property
    def alphas_cumprod(self) -> Tensor:
        """[1000] the training schedule, read anew each time: sampling goes by zero terminal SNR where that is set."""
        return alphas_cumprod(self.model)


def alphas_cumprod(model: Any) -> Tensor:
    """[1000] the training schedule of the WebUI's model, as generation goes by it now."""
    return 1 / (1 + sampling_sigmas(model).float() ** 2)


def sampling_sigmas(model: Any) -> Tensor:
    """[1000] the noise levels of the training schedule, as generation has them: the predictor's, or as it sets them
    while it samples, by the settings or the file, for zero terminal SNR.
    """
    from backend.modules.k_prediction import rescale_zero_terminal_snr_sigmas

    sigmas: Tensor = model.forge_objects.unet.model.predictor.sigmas
    wanted = option("sd_noise_schedule") == "Zero Terminal SNR"
    wanted = wanted or bool(getattr(model.model_config, "ztsnr", False))
    if not wanted or sigmas[-1] > 1000:  # about 14.6 ordinarily, about 4500 within sampling
        return sigmas
    with torch.inference_mode(False):
        return rescale_zero_terminal_snr_sigmas(sigmas.clone())  # type: ignore[no-any-return]


def loaded_model() -> Any:
    """The WebUI's model in memory; None while none is loaded."""
    from modules import sd_models

    model = sd_models.model_data.sd_model
    return model if getattr(model, "forge_objects", None) is not None else None


def loaded_checkpoint() -> Checkpoint:
    """The loaded checkpoint, loaded now if none is. SpoError for none, and for what cannot be sampled step by step."""
    from modules import sd_models

    if loaded_model() is None and sd_models.model_data.forge_loading_parameters.get("checkpoint_info") is not None:
        _load()
    model = loaded_model()
    if model is None:
        raise SpoError("No checkpoint is loaded; choose one at the top of the page.")
    info = model.sd_checkpoint_info
    if getattr(model, "is_sd2", False):
        raise SpoError(f"{info.title} is a Stable Diffusion 2 checkpoint; load an SD1.5 or SDXL one.")
    if not architecture(model):
        raise SpoError(f"{info.title} is not SD1.5 or SDXL, so it cannot be trained here; load another checkpoint.")
    unet = model.forge_objects.unet.model
    inputs = next(unet.diffusion_model.input_blocks[0].parameters()).shape[1]
    if inputs != 4:
        raise SpoError(
            f"{info.title} takes {inputs} channels (inpainting or editing); load a text-to-image checkpoint."
        )
    if model.is_sdxl and not hasattr(model, "text_processing_engine_l"):  # CLIP's text encoder, which the refiner lacks
        raise SpoError(f"{info.title} is an SDXL refiner; load the base checkpoint.")
    prediction_type = unet.predictor.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise SpoError(f'{info.title} predicts "{prediction_type}", not epsilon or v; load another checkpoint.')
    return Checkpoint(
        model=model,
        info=info,
        name=info.name_for_extra,
        hash=info.shorthash or "",
        file=Path(info.filename),
        architecture=architecture(model),
        prediction_type=prediction_type,
        low_memory="",
    )


def architecture(model: Any) -> str:
    """ "sd15", "sdxl", or "" for another."""
    if getattr(model, "is_sdxl", False):
        return "sdxl"
    return "sd15" if getattr(model, "is_sd1", False) else ""


def refuse_training(checkpoint: Checkpoint) -> None:
    """SpoError when this checkpoint can be sampled, but not trained, as the WebUI runs it."""
    storage = checkpoint.model.forge_objects.unet.model.storage_dtype
    if not isinstance(storage, torch.dtype):
        raise SpoError(
            f'The weights of {checkpoint.name} are kept as {storage}, which cannot be trained; set "Diffusion in Low '
            'Bits" to Automatic at the top of the page, or load an unquantised checkpoint.'
        )


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the loaded model, no copies. The UNet's names are those of a checkpoint file; others begin so."""
    objects = checkpoint.model.forge_objects
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in checkpoint.network.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": one for name, one in objects.vae.first_stage_model.state_dict().items()}
    for name, tensor in objects.clip.cond_stage_model.state_dict().items():
        for own, file in _LDM_TEXT[checkpoint.architecture].items():
            if name.startswith(own):
                tensors[file + name.removeprefix(own)] = tensor
    return tensors


def glance() -> a1111.Glance:
    """The checkpoint chosen at the top of the page, for the page, without loading it: training will be of that one."""
    from modules import sd_models

    chosen, model = sd_models.checkpoint_aliases.get(option("sd_model_checkpoint")), loaded_model()
    if chosen is None:
        return a1111.Glance()
    file = Path(chosen.filename)
    if model is not None and Path(model.sd_checkpoint_info.filename) == file:
        return a1111.Glance(architecture(model), file.name)
    return a1111.Glance(_architecture_in(file, file.stat().st_mtime) if file.exists() else "", file.name)


@lru_cache(maxsize=8)
def _architecture_in(file: Path, changed_s: float) -> str:
    """By the names in a .safetensors file; "" for others, which are not opened before Forge loads them."""
    if file.suffix != ".safetensors":
        return ""
    try:
        return kind_of(open_tensor_file(file)).architecture or ""
    except SpoError:
        return ""


def is_loaded(checkpoint: Checkpoint) -> bool:
    """Whether this checkpoint is still the loaded one: the same model in memory."""
    return loaded_model() is checkpoint.model


def load_afresh(checkpoint: Checkpoint) -> None:
    """Nothing: Forge never puts another checkpoint's weights into this one's modules."""


def load_checkpoint(file_name: str) -> None:
    """Choose the checkpoint in this file, as at the top of the page, and load it. Hold the queue. SpoError for none."""
    choose(file_name)
    swap_back()


def load_again(file: Path) -> None:
    """Load the checkpoint in this file if another one is loaded; the chosen one stays chosen. Hold the queue.

    Raises SpoError when the WebUI does not list it any more.
    """
    from modules import sd_models

    model = loaded_model()
    if model is not None and Path(model.sd_checkpoint_info.filename) == file:
        return
    info, data = listed(file), sd_models.model_data
    chosen = data.forge_loading_parameters
    data.forge_loading_parameters = {**chosen, "checkpoint_info": info}
    try:
        _load()
    finally:
        data.forge_loading_parameters = chosen


def swap_back() -> None:
    """Load the checkpoint chosen at the top of the page where another was left in its place, or none is loaded yet.

    Hold the queue.
    """
    from modules_forge import main_entry

    main_entry.refresh_model_loading_parameters()
    _load()


def _load() -> None:
    """What the parameters say, as generation does. SpoError when Forge cannot load it."""
    from modules import sd_models

    try:
        sd_models.forge_model_reload()
    except (ValueError, AttributeError) as error:  # "Failed to recognize model type!", or None in a model's place
        info = sd_models.model_data.forge_loading_parameters.get("checkpoint_info")
        raise SpoError(
            f"{getattr(info, 'title', 'The checkpoint')} cannot be loaded by this WebUI: {error}."
        ) from error


def chosen_checkpoint() -> Checkpoint:
    """`loaded_checkpoint`, after the chosen one was swapped back where another was left; waits for the queue then."""
    put_chosen_back(other_left_loaded, swap_back)
    return loaded_checkpoint()


def other_left_loaded() -> bool:
    """Whether another checkpoint is loaded than the chosen one, or none yet."""
    from modules import sd_models

    model, chosen = loaded_model(), sd_models.checkpoint_aliases.get(option("sd_model_checkpoint"))
    return chosen is not None and (model is None or model.sd_checkpoint_info.filename != chosen.filename)
