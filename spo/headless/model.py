"""The networks of a checkpoint as one object: prompts encoded, pictures decoded, noise predicted.

The VAE runs in float32, also beside a half-precision UNet: SDXL's own overflows in float16, and training scores decoded
pictures. The WebUI starts in the UNet's precision and falls back.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spo.algorithm.denoiser import Conditioning
from spo.checkpoint.info import CheckpointInfo
from spo.checkpoint.kinds import Architecture
from spo.checkpoint.webui_yaml import PredictionType
from spo.errors import SpoError
from spo.headless.text import CHUNK_TOKENS, by_prompt, prompt_chunks, tokenizer

_ENCODE_ROWS = 32  # chunks that a text encoder sees at once


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
        return max((len(chunks) for chunks in prompt_chunks(prompts)), default=1)

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
        parts = prompt_chunks(prompts)
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
        for tokens in self._token_batches(parts, pad=tokenizer().eos_token_id):
            output = encoder(input_ids=tokens, output_hidden_states=True)
            if clip_skip == 1:
                outputs.append(output.last_hidden_state)
            else:
                norm = getattr(encoder, "text_model", encoder).final_layer_norm
                outputs.append(norm(output.hidden_states[-clip_skip]))
        return by_prompt(outputs, len(parts))

    def _encode_sdxl(self, parts: list[list[list[int]]], is_zero: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self._text_encoders
        pad = tokenizer().eos_token_id
        narrow = [first(input_ids=tokens, output_hidden_states=True) for tokens in self._token_batches(parts, pad)]
        wide = [second(input_ids=tokens, output_hidden_states=True) for tokens in self._token_batches(parts, pad=0)]
        features = [by_prompt([output.hidden_states[-2] for output in side], len(parts)) for side in (narrow, wide)]
        pooled = torch.cat([output.text_embeds for output in wide]).unflatten(0, (len(parts), -1))[:, 0]
        return (
            torch.cat(features, dim=-1).masked_fill(is_zero[:, None, None], 0.0),
            pooled.masked_fill(is_zero[:, None], 0.0),
        )

    def _token_batches(self, parts: list[list[list[int]]], pad: int) -> Iterable[Tensor]:
        """[up to 32, 77] token ids: chunk after chunk, prompt after prompt."""
        start, end = tokenizer().bos_token_id, tokenizer().eos_token_id
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
        """[N, 4, h, w] latents of any float dtype -> [N, 3, 8 h, 8 w] pictures about [-1, 1], not clamped, float32.

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
        return decoded

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
