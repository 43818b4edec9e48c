"""The loaded checkpoint: what it is, whether it can be trained, and loading another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spo.errors import SpoError
from spo.webui.a1111.options import option
from spo.webui.a1111.queue import in_queue


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as the WebUI has loaded it.

    model, info      the WebUI's own objects: the model in memory, and its record of the file
    name, hash       of the file, without its ending; the hash may be ""
    file             the file itself
    architecture     "sd15" or "sdxl"; prediction_type: "epsilon" or "v_prediction"
    low_memory       the flag that moves parts of it between card and memory: "", "--medvram" (the UNet as one) or
                     "--lowvram" (each of its blocks)
    """

    model: Any
    info: Any
    name: str
    hash: str
    file: Path
    architecture: str
    prediction_type: str
    low_memory: str

    @property
    def network(self) -> nn.Module:
        """The UNet, with modules called as in ldm and sgm."""
        return self.model.model.diffusion_model

    @property
    def alphas_cumprod(self) -> Tensor:
        """[1000] the training schedule; the WebUI's settings may change it, so it is read anew each time."""
        return self.model.alphas_cumprod


def loaded_checkpoint() -> Checkpoint:
    """The loaded checkpoint. Raises SpoError for none, and for what cannot be sampled step by step; touches nothing."""
    from modules import sd_models

    return checkpoint_of(sd_models.model_data.get_sd_model(), _is_refiner, _prediction_type, _low_memory)


def checkpoint_of(
    model: Any,
    is_refiner: Callable[[Any], bool],
    prediction_type: Callable[[Any, str], str],
    low_memory: Callable[[Any], str] = lambda model: "",
) -> Checkpoint:
    """See `loaded_checkpoint`.

    model            the WebUI's, in memory; None for none
    is_refiner, prediction_type, low_memory
                     what WebUIs see each in their way, of the model; prediction_type may raise, and is given the title
    """
    from modules import sd_unet

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
    if is_refiner(model):
        raise SpoError(f"{title} is an SDXL refiner; load the base checkpoint.")
    if sd_unet.current_unet is not None:
        raise SpoError('Another SD Unet (TensorRT or the like) is in use; set "SD Unet" to None in the settings.')
    return Checkpoint(
        model=model,
        info=info,
        name=getattr(info, "name_for_extra", ""),
        hash=getattr(info, "shorthash", "") or "",
        file=Path(getattr(info, "filename", "")),
        architecture=_architecture(model),
        prediction_type=prediction_type(model, title),
        low_memory=low_memory(model),
    )


def _architecture(model: Any) -> str:
    return "sdxl" if getattr(model, "is_sdxl", False) else "sd15"


def _is_refiner(model: Any) -> bool:
    """The refiner has one text encoder, OpenCLIP's; the base has CLIP's beside it."""
    return getattr(model, "is_sdxl", False) and not any(
        type(embedder).__name__.startswith("FrozenCLIP") for embedder in model.conditioner.embedders
    )


def _prediction_type(model: Any, title: str) -> str:
    return "v_prediction" if getattr(model, "parameterization", "eps") == "v" else "epsilon"


def _low_memory(model: Any) -> str:
    from modules import lowvram, shared

    if not lowvram.is_enabled(model):
        return ""
    return "--lowvram" if shared.cmd_opts.lowvram else "--medvram"


def refuse_training(checkpoint: Checkpoint) -> None:
    """SpoError when this checkpoint can be sampled, but not trained, as the WebUI runs it."""
    if checkpoint.low_memory == "--lowvram":
        raise SpoError(
            "The WebUI runs with --lowvram, which keeps one block of the network on the card at a time, so it cannot "
            "be trained; start it with --medvram. Voting and comparing work as it is."
        )
    if next(checkpoint.network.parameters()).dtype.itemsize == 1 and _casts_by_hand():
        raise SpoError(
            "FP8 weights cannot be trained on this card, for which the WebUI converts them layer by layer; set "
            '"FP8 weight" to Disable in the settings.'
        )


def _casts_by_hand() -> bool:
    """Whether the WebUI converts weights and inputs layer by layer (MPS, GTX 16xx) where others have autocast."""
    from modules import devices

    with devices.autocast():
        return hasattr(nn.Linear, "org_forward")


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of the loaded model by the names that they have in a checkpoint file; no copies."""
    tensors = checkpoint.model.state_dict()
    return {name.replace(".wrapped.", "."): tensor for name, tensor in tensors.items()}  # around the text encoders


@dataclass(frozen=True)
class Glance:
    """The loaded checkpoint for the page, without loading one: its architecture, "" for none; its file's name."""

    architecture: str = ""
    file_name: str = ""


def glance() -> Glance:
    """The loaded checkpoint as far as it is loaded by now, of whatever kind it is."""
    from modules import sd_models

    model = sd_models.model_data.sd_model
    if model is None:
        return Glance()
    return Glance(_architecture(model), Path(model.sd_checkpoint_info.filename).name)


def is_loaded(checkpoint: Checkpoint) -> bool:
    """Whether this checkpoint is still the loaded one: the same model in memory, with the weights of the same file."""
    from modules import sd_models

    return sd_models.model_data.sd_model is checkpoint.model and checkpoint.model.sd_checkpoint_info is checkpoint.info


def load_afresh(checkpoint: Checkpoint) -> None:
    """Load a checkpoint once more that was put in the place of this one while our adapters were in its modules."""
    from modules import sd_models

    model = checkpoint.model
    if sd_models.model_data.sd_model is model and model.sd_checkpoint_info is not checkpoint.info:
        sd_models.reload_model_weights(model, info=model.sd_checkpoint_info, forced_reload=True)


def load_checkpoint(file_name: str) -> None:
    """Choose the checkpoint in this file, as at the top of the page, and load it. Hold the queue. SpoError for none."""
    choose(file_name)
    swap_back()


def choose(file_name: str) -> None:
    """Choose the checkpoint in this file, as at the top of the page, without loading it. SpoError for none."""
    from modules import sd_models, shared

    known = {Path(info.filename).name: info for info in sd_models.checkpoints_list.values()}
    if file_name not in known:
        raise SpoError(f"The WebUI does not list {file_name} among its checkpoints; refresh the list and choose it.")
    shared.opts.set("sd_model_checkpoint", known[file_name].title, run_callbacks=False)


def refuse_demo() -> None:
    """SpoError where this WebUI does not take the demo checkpoint; this one builds what a file's yaml says."""


def load_again(file: Path) -> None:
    """Load the checkpoint in this file if another one is loaded; the chosen one stays chosen. Hold the queue.

    Raises SpoError when the WebUI does not list it any more.
    """
    from modules import sd_models

    model = sd_models.model_data.sd_model
    if model is not None and Path(model.sd_checkpoint_info.filename) == file:
        return
    sd_models.reload_model_weights(info=listed(file))


def listed(file: Path) -> Any:
    """The WebUI's record of the checkpoint in this file. SpoError when it does not list it any more."""
    from modules import sd_models

    info = next((one for one in sd_models.checkpoints_list.values() if Path(one.filename) == file), None)
    if info is None:
        raise SpoError(f"{file.name} is not among the WebUI's checkpoints any more; put it back, and resume the run.")
    return info


def chosen_title() -> str:
    """What the list of checkpoints at the top of the page should show."""
    return str(option("sd_model_checkpoint") or "")


def swap_back() -> None:
    """Load the checkpoint chosen at the top of the page where another was left in its place, a refiner for instance, as
    the WebUI itself does before it generates. Hold the queue.
    """
    from modules import sd_models

    sd_models.reload_model_weights()


def chosen_checkpoint() -> Checkpoint:
    """`loaded_checkpoint`, after the chosen one was swapped back where another was left; waits for the queue then."""
    put_chosen_back(other_left_loaded, swap_back)
    return loaded_checkpoint()


def put_chosen_back(other_left_loaded: Callable[[], bool], swap_back: Callable[[], None]) -> None:
    """Swap the chosen checkpoint back where another was left; waits for the queue then."""
    if other_left_loaded():
        with in_queue("SPO"):
            if other_left_loaded():
                swap_back()


def other_left_loaded() -> bool:
    """Whether another checkpoint is loaded than the chosen one; None loaded yet is not."""
    from modules import sd_models

    model = sd_models.model_data.sd_model
    chosen = sd_models.checkpoint_aliases.get(option("sd_model_checkpoint"))
    return model is not None and chosen is not None and model.sd_checkpoint_info.filename != chosen.filename
