"""The headless host: a checkpoint as a UNet, a VAE and text encoders, through diffusers and transformers, offline.

Every configuration is derived from `inspect_checkpoint`, so no hub and no shipped configuration is needed, and small
checkpoints load like full ones. Prompts, VAE and schedule follow the WebUI, with these differences:

- Emphasis, BREAK, prompt editing and embeddings are WebUI syntax that is not interpreted here: parentheses are text.
- An empty negative prompt of SDXL is zeroed row by row; the WebUI does so when all rows of a batch are empty.
- The VAE runs in float32, also beside a half-precision UNet: SDXL's own overflows in float16, and training scores
  decoded pictures. The WebUI starts in the UNet's precision and falls back.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo.algorithm.denoiser import Conditioning
from spo.checkpoint.single_file import (
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    Architecture,
    CheckpointInfo,
    FolderPart,
    NoiseSchedule,
    PredictionType,
    TextEncoderShape,
    UNetShape,
    VaeShape,
    clip_prefix,
    inspect_checkpoint,
    open_folder_part,
    vae_shape,
)
from spo.checkpoint.tensor_file import TensorFile, open_tensor_file, read_tensors
from spo.errors import SpoError

TRAINING_TIMESTEPS = 1000
CHUNK_TOKENS = 75  # of a prompt; with the start and end tokens a chunk is 77 places long
COMMA_BACKTRACK_TOKENS = 20  # the WebUI's default for "Prompt word wrap length limit"
_ENCODE_ROWS = 32  # chunks that a text encoder sees at once
_LAST_ALPHA_CUMPROD = 4.8973451890853435e-08  # instead of an exact 0, as the WebUI does: sigma stays finite


def load_model(
    path: Path | str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    vae_path: Path | str | None = None,
    prediction_type: str | None = None,
    config_path: Path | str | None = None,
    vae_dtype: torch.dtype | None = None,
) -> DiffusersModel:
    """The checkpoint at `path` (see `inspect_checkpoint`, also for the last two), frozen and in eval mode.

    dtype      of the UNet, the text encoders and the text features
    vae_path   a VAE instead of the checkpoint's: an LDM file (.safetensors, .pt, .ckpt; `first_stage_model.` before its
               names or not; a whole checkpoint too), or a diffusers folder
    vae_dtype  default: float32, or `dtype` if the VAE was made for half precision (a file or folder with "fp16" and
               "fix" in its name, or `force_upcast: false` in its configuration)

    Raises SpoError when something is missing, is of another kind, or does not fit.
    """
    info = inspect_checkpoint(path, config_path=config_path, prediction_type=prediction_type)
    if not info.text_encoders:
        raise SpoError(f'"{info.path.name}" holds no text encoder, so prompts cannot be encoded; use a full checkpoint')
    if info.vae is None and vae_path is None:
        raise SpoError(f'"{info.path.name}" holds no VAE: give one, a file or a diffusers folder')
    device = torch.device(device)
    file = None if info.is_folder else open_tensor_file(info.path)
    alphas_cumprod = _alphas_cumprod(info, file)
    numbers = range(len(info.text_encoders))
    return DiffusersModel(
        info=info,
        unet=_load_unet(info, file, device, dtype),
        vae=_load_vae(info, file, None if vae_path is None else Path(vae_path), device, dtype, vae_dtype),
        text_encoders=[_load_text_encoder(info, file, number, device, dtype) for number in numbers],
        alphas_cumprod=alphas_cumprod,
        device=device,
        dtype=dtype,
    )


class DiffusersModel:
    """The networks of one checkpoint, frozen, in eval mode. Latents are the UNet's: the VAE's times the scale factor.

    info             what the checkpoint is
    architecture     "sd15" or "sdxl"; prediction_type: "epsilon" or "v_prediction"
    unet, vae        diffusers' UNet2DConditionModel, in `dtype`, and AutoencoderKL
    alphas_cumprod   [1000] float32
    zero_terminal_snr  whether the last of them is (nearly) zero, so sampling begins at pure noise
    latent_downscale   pixels per latent pixel, 8 in real checkpoints
    """

    def __init__(
        self,
        *,
        info: CheckpointInfo,
        unet: Any,
        vae: Any,
        text_encoders: Sequence[nn.Module],
        alphas_cumprod: Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.info = info
        self.architecture: Architecture = info.architecture
        self.prediction_type: PredictionType = info.prediction_type
        self.unet = unet
        self.vae = vae
        self.alphas_cumprod = alphas_cumprod.to(device)
        self.zero_terminal_snr = bool(alphas_cumprod[-1] < 1e-6)
        self.dtype = dtype
        self.device = device
        self.latent_downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        self._text_encoders: list[Any] = list(text_encoders)

    # ---- prompts

    def count_chunks(self, prompts: Sequence[str]) -> int:
        """How many chunks of 75 tokens the longest of the prompts takes, at least 1."""
        return max((len(chunks) for chunks in _prompt_chunks(prompts)), default=1)

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        clip_skip: int = 1,
        width: int,
        height: int,
        chunks: int | None = None,
        negative: bool = False,
    ) -> Conditioning:
        """Prompts -> the UNet's conditioning, N rows in `dtype` on the model's device; no gradient.

        width, height  of the pictures in pixels: SDXL is told (height, width, 0, 0, height, width)
        clip_skip      1: the last layer; n: the n-th last, then the final norm (SD1.x). SDXL always takes both
                       encoders' penultimate layers without norm, as the WebUI does whatever its clip skip
        chunks         encode in this many chunks; default: as many as the longest of these prompts needs. Prompts that
                       meet in one batch (positive and negative) need the same number: see `count_chunks`
        negative       these are negative prompts: SDXL's empty ones become zeros (features and pooled), as sgm and the
                       WebUI do; an empty prompt otherwise, and any of SD1.x, is encoded like every other

        Longer prompts are split into chunks of 75 tokens, each with its own start and end token, encoded one by one,
        and joined along L: cross_attention is [N, 77 * chunks, D]. As in the WebUI a chunk that would end within 20
        tokens after a comma ends at that comma, missing chunks are empty ones, and SDXL's pooled features are those of
        the first chunk.

        Raises SpoError after `free_text_encoders`, for no prompts, or a clip skip that the encoder has not.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one string; a sequence of strings is wanted")
        if not self._text_encoders:
            raise SpoError("the text encoders were freed; load the checkpoint again to encode prompts")
        layers = self.info.text_encoders[0].layers
        if not prompts or not 1 <= clip_skip <= layers:
            problem = "no prompts to encode" if not prompts else f"clip skip {clip_skip} (accepted: 1 to {layers})"
            raise SpoError(problem)
        parts = _prompt_chunks(prompts)
        wanted = max(map(len, parts))
        if chunks is not None and chunks < wanted:
            raise SpoError(f"the prompts need {wanted} chunks of {CHUNK_TOKENS} tokens, not {chunks} as asked")
        parts = [part + [[]] * ((chunks or wanted) - len(part)) for part in parts]
        if self.architecture == "sd15":
            return Conditioning(self._encode_sd15(parts, clip_skip))
        empty = [negative and prompt == "" for prompt in prompts]
        features, pooled = self._encode_sdxl(parts, torch.tensor(empty, device=self.device))
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.device)
        return Conditioning(features, pooled, sizes.repeat(len(prompts), 1))

    def _encode_sd15(self, parts: list[list[list[int]]], clip_skip: int) -> Tensor:
        encoder = self._text_encoders[0]
        outputs = []
        for tokens in self._token_batches(parts, pad=_tokenizer().eos_token_id):
            output = encoder(input_ids=tokens, output_hidden_states=True)
            if clip_skip == 1:
                outputs.append(output.last_hidden_state)
            else:
                norm = getattr(encoder, "text_model", encoder).final_layer_norm
                outputs.append(norm(output.hidden_states[-clip_skip]))
        return _by_prompt(outputs, len(parts))

    def _encode_sdxl(self, parts: list[list[list[int]]], is_zero: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self._text_encoders
        pad = _tokenizer().eos_token_id
        narrow = [first(input_ids=tokens, output_hidden_states=True) for tokens in self._token_batches(parts, pad)]
        wide = [second(input_ids=tokens, output_hidden_states=True) for tokens in self._token_batches(parts, pad=0)]
        features = [_by_prompt([output.hidden_states[-2] for output in side], len(parts)) for side in (narrow, wide)]
        pooled = torch.cat([output.text_embeds for output in wide]).unflatten(0, (len(parts), -1))[:, 0]
        return (
            torch.cat(features, dim=-1).masked_fill(is_zero[:, None, None], 0.0),
            pooled.masked_fill(is_zero[:, None], 0.0),
        )

    def _token_batches(self, parts: list[list[list[int]]], pad: int) -> Iterable[Tensor]:
        """[up to 32, 77] token ids: chunk after chunk, prompt after prompt."""
        tokenizer = _tokenizer()
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        rows = [[start, *chunk, end] + [pad] * (CHUNK_TOKENS - len(chunk)) for part in parts for chunk in part]
        for first in range(0, len(rows), _ENCODE_ROWS):
            yield torch.tensor(rows[first : first + _ENCODE_ROWS], device=self.device)

    def free_text_encoders(self) -> None:
        """Drops the text encoders and gives their memory back; prompts must have been encoded before."""
        self._text_encoders = []
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- pictures

    @torch.no_grad()
    def decode(self, latents: Tensor, *, decode_batch: int = 4, tiled: bool = False) -> Tensor:
        """[N, 4, h, w] latents of any float dtype -> [N, 3, 8 h, 8 w] pictures in [-1, 1], float32.

        decode_batch  this many at once, so that memory is bounded
        tiled         decode what is larger than the VAE's tile (512 px) in overlapping tiles: less memory, faint seams
        """
        if tiled:
            self.vae.enable_tiling()
        else:
            self.vae.disable_tiling()
        pictures = []
        for part in latents.split(max(1, decode_batch)):
            scaled = part.to(self.device, torch.float32) / self.info.scale_factor
            pictures.append(self.vae.decode(scaled.to(self.vae.dtype)).sample.float())
        decoded = torch.cat(pictures)
        if self.vae.dtype == torch.float16 and bool(torch.isnan(decoded).any()):
            raise SpoError("the VAE gave NaN in float16: decode in float32, or give the fp16-fix VAE")
        return decoded.clamp(-1.0, 1.0)

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, noise: Tensor | None = None, encode_batch: int = 4) -> Tensor:
        """[N, 3, 8 h, 8 w] pictures in [-1, 1] -> [N, 4, h, w] float32 latents.

        The mean of the VAE's distribution, or a sample of it when standard normal `noise` [N, 4, h, w] is given.
        """
        latents = []
        for part in pixels.split(max(1, encode_batch)):
            distribution = self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist
            latents.append(torch.stack([distribution.mean, distribution.std]).float())
        mean, std = torch.cat(latents, dim=1)
        sample = mean if noise is None else mean + std * noise.to(mean)
        return sample * self.info.scale_factor

    # ---- the UNet

    def predict(self, x_vp: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's raw output (epsilon or v) [N, 4, h, w] in x_vp's dtype, with gradient where it is enabled.

        x_vp        [N, 4, h, w] noisy latent, variance-preserving: sqrt(alpha_cumprod) x_0 + sqrt(1 - ...) noise
        timesteps   [N] or 0-dim, 0 ... 999, whole or fractional
        """
        added = None
        if self.architecture == "sdxl":
            if conditioning.pooled is None or conditioning.size_ids is None:
                raise SpoError("an SDXL network needs pooled text features and size ids: encode prompts with it")
            added = {"text_embeds": conditioning.pooled.to(self.dtype), "time_ids": conditioning.size_ids}
        output = self.unet(
            x_vp.to(self.dtype),
            timesteps.to(x_vp.device).expand(len(x_vp)),
            encoder_hidden_states=conditioning.cross_attention.to(self.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output.to(x_vp.dtype)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the UNet's blocks in the backward pass instead of keeping their activations: less memory, slower.

        Older diffusers checkpoint only blocks in train mode, so the blocks that know checkpointing are marked so; that
        is their own flag alone (no dropout below them is touched). Call again after `unet.train()` or `unet.eval()`.
        """
        if enabled:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()
        for module in self.unet.modules():
            if hasattr(module, "gradient_checkpointing") and module is not self.unet:
                module.training = enabled

    def memory_bytes(self) -> int:
        """Bytes that the weights of all networks still held take, on whatever device."""
        networks: list[Any] = [self.unet, self.vae, *self._text_encoders]
        tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---------------------------------------------------------------------------------------------- prompts to tokens


@cache
def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(Path(__file__).parents[1] / "clip_tokenizer"))


def _prompt_chunks(prompts: Sequence[str]) -> list[list[list[int]]]:
    """Per prompt its chunks, at least one, of at most 75 token ids each, without start and end tokens."""
    if not prompts:
        return []
    tokenizer = _tokenizer()
    ids = tokenizer(list(prompts), truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    return [_split_tokens(tokens, comma) for tokens in ids]


def _split_tokens(tokens: Sequence[int], comma: int) -> list[list[int]]:
    """Chunks of 75 tokens; one that is full carries what stands after a comma, if it is 20 tokens or fewer, over."""
    chunks: list[list[int]] = []
    chunk: list[int] = []
    for token in tokens:
        if len(chunk) == CHUNK_TOKENS:
            after_comma = 0
            if token != comma and comma in chunk:
                after_comma = chunk[::-1].index(comma)
            carried = after_comma if after_comma < COMMA_BACKTRACK_TOKENS else 0
            chunks.append(chunk[: CHUNK_TOKENS - carried])
            chunk = chunk[CHUNK_TOKENS - carried :]
        chunk.append(token)
    return [*chunks, chunk] if chunk or not chunks else chunks


def _by_prompt(outputs: Sequence[Tensor], prompts: int) -> Tensor:
    """Batches of [chunks, 77, D] -> [prompts, 77 * chunks, D]."""
    return torch.cat(list(outputs)).unflatten(0, (prompts, -1)).flatten(1, 2)


# ---------------------------------------------------------------------------------------------- the noise schedule


def _alphas_cumprod(info: CheckpointInfo, file: TensorFile | None) -> Tensor:
    alphas = _schedule_alphas_cumprod(info.schedule)
    if file is not None and "alphas_cumprod" in file.tensors:
        stored = read_tensors(file, ["alphas_cumprod"])["alphas_cumprod"]
        if stored.shape != (TRAINING_TIMESTEPS,):
            raise SpoError(f'"{info.path.name}" has a schedule of the shape {list(stored.shape)}, not 1000 timesteps')
        was_rounded = stored.element_size() < 4 and torch.allclose(stored.float(), alphas.float(), rtol=0, atol=4e-3)
        alphas = alphas if was_rounded else stored.double()
    if info.zero_terminal_snr and info.prediction_type == "v_prediction" and alphas[-1] > 1e-6:
        # Lin et al. 2023, algorithm 1: shift the last square root to 0, scale the first back
        roots = alphas.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
    return alphas.clamp(min=_LAST_ALPHA_CUMPROD).float()


def _schedule_alphas_cumprod(schedule: NoiseSchedule) -> Tensor:
    start, end, count = schedule.beta_start, schedule.beta_end, TRAINING_TIMESTEPS
    if schedule.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    elif schedule.beta_schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    else:
        raise SpoError(f'the beta schedule "{schedule.beta_schedule}" is not known (accepted: scaled_linear, linear)')
    return (1.0 - betas).cumprod(0)


# ---------------------------------------------------------------------------------------------- networks from tensors


def empty_unet(info: CheckpointInfo) -> Any:
    """The checkpoint's UNet (diffusers' UNet2DConditionModel) on the meta device, no weights: to count and weigh."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        if info.is_folder:
            return UNet2DConditionModel.from_config(_public(open_folder_part(info.path / "unet")))
        return UNet2DConditionModel(**_unet_config(info.unet))


def _load_unet(info: CheckpointInfo, file: TensorFile | None, device: torch.device, dtype: torch.dtype) -> Any:
    unet = empty_unet(info)
    if file is None:
        tensors = _folder_tensors(open_folder_part(info.path / "unet"))
        return _fill(unet, tensors, device, dtype, f"UNet in {info.path.name}")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    tensors = read_tensors(file, [name for name in file.tensors if name.startswith(UNET_PREFIX)])
    converted = convert_ldm_unet_checkpoint(tensors, dict(unet.config))
    unused = len(tensors) - len(unet.state_dict().keys() & converted.keys())
    if unused:
        warnings.warn(f"{info.path.name}: {unused} tensors of its UNet have no known use, left out", stacklevel=3)
    tensors.clear()  # `converted` alone holds them now, and `_fill` lets go of one after the other
    return _fill(unet, converted, device, dtype, f"UNet in {info.path.name}")


def _unet_config(shape: UNetShape) -> dict[str, Any]:
    depths = [depth or 1 for depth in shape.depths[:-1]] + [shape.middle_depth]  # diffusers: the middle has the last's
    config: dict[str, Any] = {
        "sample_size": 128 if shape.added_width else 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": shape.channels,
        "layers_per_block": shape.res_blocks,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in shape.depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(shape.depths)),
        "transformer_layers_per_block": depths,
        "attention_head_dim": list(shape.heads),  # diffusers' name for the number of heads
        "cross_attention_dim": shape.context_width,
        "use_linear_projection": shape.linear_projection,
    }
    if shape.added_width:
        size_width = 256  # of each of the six embedded sizes; the rest is pooled text
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": size_width,
            "projection_class_embeddings_input_dim": shape.added_width,
        }
    return config


def _load_vae(
    info: CheckpointInfo,
    file: TensorFile | None,
    override: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None,
) -> Any:
    vae, tensors, is_half_safe = _vae_and_tensors(info, file, override)
    vae_dtype = vae_dtype or (dtype if is_half_safe else torch.float32)
    return _fill(vae, tensors, device, vae_dtype, f"VAE in {(override or info.path).name}")


def _vae_and_tensors(
    info: CheckpointInfo, file: TensorFile | None, override: Path | None
) -> tuple[Any, dict[str, Tensor], bool]:
    """The VAE without weights, its tensors, and whether it was made for half precision."""
    if override is None:
        if file is None or info.vae is None:
            return _vae_in_folder(info.path / "vae", info.scale_factor)
        return *_vae_in_file(file, VAE_PREFIX, info.vae, info.scale_factor), False
    is_half_safe = "fp16" in override.name.lower() and "fix" in override.name.lower()
    if override.is_dir():
        inner = override / "vae" if (override / "vae").is_dir() else override
        vae, tensors, says_so = _vae_in_folder(inner, info.scale_factor)
        return vae, tensors, says_so or is_half_safe
    file = open_tensor_file(override)
    for prefix in (VAE_PREFIX, ""):
        if f"{prefix}decoder.conv_in.weight" in file.tensors and f"{prefix}encoder.conv_in.weight" in file.tensors:
            if any(entry.startswith(f"{prefix}decoder.up_blocks.") for entry in file.tensors):
                raise SpoError(f'"{override.name}" has diffusers names: give the folder that holds its config.json')
            return *_vae_in_file(file, prefix, vae_shape(file, prefix), info.scale_factor), is_half_safe
    raise SpoError(f'"{override.name}" is not a VAE: it holds no encoder and decoder')


def _vae_in_file(file: TensorFile, prefix: str, shape: VaeShape, scale_factor: float) -> tuple[Any, dict[str, Tensor]]:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = len(shape.channels)
    with torch.device("meta"):
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=shape.channels,
            layers_per_block=shape.res_blocks,
            latent_channels=shape.latent_channels,
            sample_size=512,
            scaling_factor=scale_factor,
        )
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    names = [name for name in file.tensors if name.startswith(tuple(prefix + part for part in parts))]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(file, names).items()}
    return vae, convert_ldm_vae_checkpoint(tensors, dict(vae.config))


def _vae_in_folder(folder: Path, scale_factor: float) -> tuple[Any, dict[str, Tensor], bool]:
    from diffusers import AutoencoderKL

    part = open_folder_part(folder)
    kind = part.config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL" or part.config.get("latent_channels", 4) != 4:
        raise SpoError(f'"{folder}" holds a {kind}, not a Stable Diffusion VAE (AutoencoderKL, 4 latent channels)')
    with torch.device("meta"):
        vae = AutoencoderKL.from_config({**_public(part), "scaling_factor": scale_factor})
    old_names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    tensors = {}
    for name, tensor in _folder_tensors(part).items():
        *before, layer, leaf = name.split(".")
        tensors[".".join([*before, old_names.get(layer, layer), leaf])] = tensor
    return vae, tensors, part.config.get("force_upcast") is False


def _load_text_encoder(
    info: CheckpointInfo, file: TensorFile | None, number: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = info.text_encoders[number]
    with torch.device("meta"):
        config = CLIPTextConfig(**_text_config(shape))
        encoder = CLIPTextModelWithProjection(config) if shape.projection else CLIPTextModel(config)
    if file is None:
        folder = info.path / ("text_encoder" if number == 0 else "text_encoder_2")
        tensors = _folder_tensors(open_folder_part(folder))
    elif shape.kind == "clip":
        prefix = clip_prefix(file, info.architecture)
        names = [name for name in file.tensors if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(file, names).items()}
    else:
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        names = [name for name in file.tensors if name.startswith(OPEN_CLIP_PREFIX)]
        tensors = convert_open_clip_checkpoint(encoder, read_tensors(file, names), prefix=OPEN_CLIP_PREFIX)
    # transformers 5 has no `text_model.` in CLIPTextModel, but in CLIPTextModelWithProjection
    outer = "text_model." if any(name.startswith("text_model.") for name in encoder.state_dict()) else ""
    named = {
        name if name == "text_projection.weight" else outer + name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
    }
    return _fill(encoder, named, device, dtype, f"text encoder {number + 1} in {info.path.name}")


def _text_config(shape: TextEncoderShape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions,
        "projection_dim": shape.projection or shape.width,
        "hidden_act": shape.activation,
        "layer_norm_eps": shape.norm_epsilon,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def _public(part: FolderPart) -> dict[str, Any]:
    """The configuration without the entries that describe the file itself."""
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


def _folder_tensors(part: FolderPart) -> dict[str, Tensor]:
    return {name: tensor for file in part.files for name, tensor in read_tensors(file, file.tensors).items()}


def _fill(network: Any, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype, what: str) -> Any:
    """The network, built on the meta device, with `tensors` as its weights: on `device` in `dtype`, frozen, eval."""
    wanted = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("position_ids")}
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise SpoError(f"the {what} is incomplete: {len(missing)} tensors are missing, such as {missing[0]}")
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            found, expected = list(tensors[name].shape), list(tensor.shape)
            raise SpoError(f"the {what} does not fit: {name} has the shape {found} where {expected} is expected")
    moved = {name: tensors.pop(name).to(device=device, dtype=dtype) for name in wanted}
    network.load_state_dict(moved, strict=False, assign=True)
    for module in network.modules():
        if isinstance(getattr(module, "position_ids", None), Tensor):  # 0, 1, 2, ...: not a weight
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return network.requires_grad_(False).eval()
