"""The latent reward model: a diffusion network's way down as the judge of noisy latents (LPO, Zhang et al. 2025, arXiv
2502.01051, section 4.1; models at huggingface.co/casiatao/LRM).

    score = exp(logit_scale) * cosine(W_visual f(x_t, t, prompt), W_text g(prompt))

f joins the means over the picture of each level's last features on the UNet's way down, and of the middle block's
(4800 wide in SD1.5, 3520 in SDXL); g is the text encoder's state at the end token, the second encoder's in SDXL. Both
pass the projections to 768 (SDXL: 1280). The middle block's means alone are guided, at 7.5 over the empty prompt.

What was published is a UNet and text encoders of their own, trained together with the projections: it is not a head
that another checkpoint's UNet could serve. So it needs no decoder and no clean prediction, but half of a second UNet;
the way up is left out of the file and of memory.

Deliberate differences from the published code:
- it is given the noise level that the latents have, as in its training; LPO's sampling loop gives the one before;
- text encoders compute in float32, once for each prompt; projections and cosines in float32.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo.algorithm.diffusion import network_input
from spo.algorithm.preference import Candidates
from spo.checkpoint.convert import check_name, check_room
from spo.checkpoint.folder import FolderPart, open_folder_part
from spo.checkpoint.tensor_file import TensorFile, is_pickle, read_tensors, reads_pickles_safely
from spo.errors import SpoError
from spo.files import write_whole
from spo.preference.clip.towers import (
    TextTower,
    TowerShape,
    check_tensors,
    in_float32,
    token_ids,
    unit,
)
from spo.preference.placement import Placement, without_autocast
from spo.resting import Resting

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

KIND = "latent_reward"
GUIDANCE_SCALE = 7.5
PROJECTIONS = "state_dict.pt"  # what lies beside unet/ and text_encoder/ in a published folder
_WAY_UP = ("up_blocks.", "conv_norm_out.", "conv_out.")
_KNOWN_PROMPTS = 256  # whose features are remembered, 0.2 MB each in SD1.5, 0.6 in SDXL


# ---------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class _Text:
    """Of N prompts, float32: states [N, 77, D] for the UNet, pooled [N, projection] of the last encoder, projected."""

    states: Tensor
    pooled: Tensor


class LatentReward(nn.Module):
    """The `PreferenceModel`. Build it with `read_latent_reward`.

    unet          without its way up (see `empty_unet`); text_encoders: one, or SDXL's two
    projection    width of the common features
    latents_per_call  how many latents one pass of the network takes, each with its prompt and with the empty one
    """

    needs_pixels = False
    needs_denoised = False

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_shapes: Sequence[TowerShape],
        vocabularies: Sequence[int],
        projection: int,
        name: str = "latent reward model",
        latents_per_call: int = 8,
    ) -> None:
        super().__init__()
        self.name, self.latents_per_call = name, latents_per_call
        self.unet = unet
        self.text_encoders = nn.ModuleList(map(TextTower, text_shapes, vocabularies))
        self.visual_projection = nn.Linear(feature_width(unet), projection, bias=False)
        self.text_projection = nn.Linear(text_shapes[-1].width, projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.resting: Resting | None = None
        self._known: dict[str, _Text] = {}

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32 on the candidates' device; see `PreferenceModel`."""
        count, images = candidates.x.shape[:2]
        if len(prompts) != images:
            raise ValueError(f"{len(prompts)} prompts for {images} images")
        flat = candidates.x.flatten(0, 1).float()
        latents = network_input(flat, flat.new_full((len(flat),), candidates.sigma))
        text, empty = self._text(prompts), self._text([""])
        device = self.visual_projection.weight.device
        pictures = []
        with without_autocast(device):
            with self.resting.awake() if self.resting is not None else nullcontext():
                for rows in torch.arange(len(flat)).split(self.latents_per_call):
                    prompted = _Text(text.states[rows % images], text.pooled[rows % images])
                    features = self.latent_features(latents[rows].to(device), candidates.timestep, prompted, empty)
                    pictures.append(unit(self.visual_projection(features)))
            cosines = (torch.cat(pictures).unflatten(0, (count, images)) * unit(text.pooled.to(device))).sum(-1)
            scores = self.logit_scale.exp() * cosines
        return scores.to(candidates.x.device)

    def latent_features(self, latents: Tensor, timestep: float, prompted: _Text, empty: _Text) -> Tensor:
        """[N, `feature_width`] float32 of [N, 4, h, w] latents as the UNet sees them; prompted: of N, empty: of 1."""
        count = len(latents)
        states = torch.cat([prompted.states, empty.states.expand(count, -1, -1)])
        pooled = torch.cat([prompted.pooled, empty.pooled.expand(count, -1)])
        ends = self._way_down(torch.cat([latents, latents]), timestep, states, pooled)
        *levels, (middle, unprompted) = [end.float().mean((2, 3)).split(count) for end in ends]
        return torch.cat([*(level[0] for level in levels), unprompted + GUIDANCE_SCALE * (middle - unprompted)], 1)

    def _way_down(self, latents: Tensor, timestep: float, states: Tensor, pooled: Tensor) -> list[Tensor]:
        """[N, channels, h, w] of each level before it is halved, and of the middle."""
        unet: Any = self.unet
        weight = unet.conv_in.weight
        latents, states = latents.to(weight), states.to(weight)
        times = torch.full((len(latents),), float(timestep), device=weight.device)
        time = unet.time_embedding(unet.time_proj(times).to(weight.dtype))
        if unet.config.addition_embed_type == "text_time":
            side = float(8 * unet.config.sample_size)  # pictures of the size it was trained on, uncropped
            sizes = unet.add_time_proj(torch.tensor([side, side, 0.0, 0.0, side, side], device=weight.device))
            added = torch.cat([pooled.to(weight), sizes.flatten().to(weight).expand(len(pooled), -1)], 1)
            time = time + unet.add_embedding(added)
        x = unet.conv_in(latents)
        ends = []
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                x, outputs = block(hidden_states=x, temb=time, encoder_hidden_states=states)
            else:
                x, outputs = block(hidden_states=x, temb=time)
            ends.append(outputs[len(block.resnets) - 1])  # the last one of a halved level is the halved picture
        return [*ends, unet.mid_block(x, time, encoder_hidden_states=states)]

    def _text(self, prompts: Sequence[str]) -> _Text:
        """Features of prompts, on the CPU; each distinct one is encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if len(self._known) + len(new) > _KNOWN_PROMPTS:
            self._known.clear()
            new = list(dict.fromkeys(prompts))
        for prompt in new:
            self._known[prompt] = self._encoded(prompt)
        chosen = [self._known[prompt] for prompt in prompts]
        return _Text(torch.cat([text.states for text in chosen]), torch.cat([text.pooled for text in chosen]))

    def _encoded(self, prompt: str) -> _Text:
        """SD1.5: the last states, normed. SDXL: both encoders' last but one, the second's tokens padded with zeros."""
        ids = token_ids([prompt])
        end = int(ids[0].argmax())
        states, pooled = [], torch.empty(0)
        for number, module in enumerate(self.text_encoders):
            encoder: Any = module
            if number == 1:
                ids = ids.masked_fill(torch.arange(ids.shape[1]) > end, 0)
            before, last = encoder.states(ids)
            last = in_float32(encoder.final_layer_norm, last)
            states.append(last if len(self.text_encoders) == 1 else before)
            pooled = last[:, end]
        return _Text(torch.cat(states, -1), in_float32(self.text_projection, pooled))


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The UNet of a diffusers configuration without its way up, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    for name in _WAY_UP:
        delattr(unet, name.removesuffix("."))
    return unet


def feature_width(unet: Any) -> int:
    """Channels of all levels and of the middle block, which has the last level's."""
    channels = unet.config.block_out_channels
    return sum(channels) + channels[-1]


# ---------------------------------------------------------------------------------------------- files


def is_latent_reward(file: TensorFile) -> bool:
    """Whether `pack_latent_reward` wrote the file."""
    return file.metadata.get("spo_preference") == KIND


def is_published_folder(path: Path) -> bool:
    """Whether a folder is laid out as the models were published: networks of their own and the projections."""
    return (path / PROJECTIONS).is_file() and (path / "unet").is_dir() and (path / "text_encoder").is_dir()


def pack_latent_reward(
    folder: Path, target: Path, *, dtype: torch.dtype = torch.float16, replace: bool = False
) -> None:
    """Write a published folder as one new .safetensors file without the way up, whole or not at all.

    dtype  of the weights; `logit_scale` stays float32

    Raises SpoError for a folder that lacks something, and where this torch reads no pickles safely.
    """
    from safetensors.torch import save_file

    check_name(target, replace)
    unet = open_folder_part(folder / "unet")
    encoders = [
        open_folder_part(folder / name) for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()
    ]
    tensors = {
        f"unet.{name}": value for name, value in _tensors_of(unet).items() if not name.startswith(_WAY_UP)
    } | _projections(folder / PROJECTIONS)
    for number, part in enumerate(encoders):
        for name, value in _tensors_of(part).items():
            name = name.removeprefix("text_model.")
            inner = name if name == "text_projection.weight" else f"text_encoders.{number}.{name}"
            if not name.endswith(".position_ids"):
                tensors[inner] = value
    check_room(target, sum(value.numel() for value in tensors.values()) * dtype.itemsize)
    written = {
        name: value.to(torch.float32 if name == "logit_scale" else dtype).contiguous()
        for name, value in tensors.items()
    }
    metadata = {
        "spo_preference": KIND,
        "architecture": "sdxl" if len(encoders) == 2 else "sd15",
        "unet_config": json.dumps(dict(unet.config)),
        "text_configs": json.dumps([dict(part.config) for part in encoders]),
    }
    write_whole(target, lambda temporary: save_file(written, temporary, metadata))


def read_latent_reward(file: TensorFile, name: str, place: Placement) -> LatentReward:
    """The frozen model in a file that `pack_latent_reward` wrote; the UNet goes to `place`, text stays on the CPU.

    Raises SpoError for a file that is damaged.
    """
    source = f'"{file.path.name}"'
    try:
        configs = json.loads(file.metadata["text_configs"])
        with torch.device("meta"):
            model = LatentReward(
                empty_unet(json.loads(file.metadata["unet_config"])),
                [_tower_shape(config) for config in configs],
                [int(config["vocab_size"]) for config in configs],
                file.tensors["visual_projection.weight"].shape[0],
                name,
            )
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise SpoError(f"{source} is a damaged latent reward model ({error!r}); convert it again.") from error
    check_tensors(model, {name: entry.shape for name, entry in file.tensors.items()}, source, "latent reward model")
    weights = {}
    for key, value in read_tensors(file, file.tensors).items():
        if key.startswith(("text_encoders.", "text_projection.")):
            weights[key] = value
        else:
            dtype = place.dtype if key.startswith("unet.") else torch.float32
            weights[key] = value.to("cpu" if place.rests else place.device, dtype, copy=True)
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    if place.rests:
        model.resting = Resting(model, place.device, lambda key: not key.startswith(("text_encoders.", "text_proj")))
    return model


def _tower_shape(config: Mapping[str, Any]) -> TowerShape:
    return TowerShape(
        int(config["hidden_size"]),
        int(config["intermediate_size"]),
        int(config["num_hidden_layers"]),
        int(config["num_attention_heads"]),
        str(config.get("hidden_act", "quick_gelu")),
        float(config.get("layer_norm_eps", 1e-5)),
    )


def _tensors_of(part: FolderPart) -> dict[str, Tensor]:
    return {name: value for file in part.files for name, value in read_tensors(file, file.tensors).items()}


def _projections(path: Path) -> dict[str, Tensor]:
    """The projections and the logit scale of a published folder, by this module's names.

    SDXL's file holds no text projection: that is the second text encoder's own.
    """
    with path.open("rb") as stream:
        start = stream.read(64)
    if not is_pickle(start) or not reads_pickles_safely():
        raise SpoError(
            f'"{path}" is a pickle, which PyTorch {torch.__version__} does not read safely: convert the folder outside '
            f'the WebUI by `python run.py convert-preference "{path.parent}"`.'
        )
    try:
        parts = torch.serialization.load(str(path), map_location="cpu", weights_only=True)
        tensors = {
            f"{name}.weight": parts[name]["weight"]
            for name in ("visual_projection", "text_projection")
            if name in parts
        }
        return {**tensors, "logit_scale": torch.as_tensor(parts["logit_scale"]).reshape(())}
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise SpoError(f'"{path}" is no file of projections of a latent reward model ({error!r}).') from error
