"""The networks of a checkpoint as one object: prompts encoded, pictures decoded, noise predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spo.algorithm.denoiser import Conditioning
from spo.checkpoint.info import CheckpointInfo
from spo.checkpoint.kinds import Architecture
from spo.checkpoint.webui_yaml import PredictionType
from spo.errors import SpoError
from spo.headless.taesd import TinyDecoder
from spo.headless.text import TextEncoders
from spo.headless.vae import Vae
from spo.training.memory import free_memory


class DiffusersModel:
    """The networks of one checkpoint, frozen, in eval mode. Latents are the UNet's: the VAE's times the scale factor.

    info             what the checkpoint is
    architecture     "sd15" or "sdxl"; prediction_type: "epsilon" or "v_prediction"
    unet             diffusers' UNet2DConditionModel, in `dtype`
    vae, decoder     the VAE, which encodes; and who decodes, itself or a TAESD
    alphas_cumprod   [1000] float32, on the device
    zero_terminal_snr  whether the last of them is (nearly) zero, so sampling begins at pure noise
    latent_downscale   pixels per latent pixel, 8 in real checkpoints
    """

    def __init__(
        self,
        *,
        info: CheckpointInfo,
        unet: Any,
        vae: Vae,
        taesd: TinyDecoder | None,
        load_text_encoders: Callable[[], TextEncoders],
        alphas_cumprod: Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.info = info
        self.architecture: Architecture = info.architecture
        self.prediction_type: PredictionType = info.prediction_type
        self.unet = unet
        self.vae = vae
        self.decoder: Vae | TinyDecoder = taesd or vae
        self.alphas_cumprod = alphas_cumprod.to(device)
        self.zero_terminal_snr = bool(alphas_cumprod[-1] < 1e-6)
        self.dtype = dtype
        self.device = device
        self.latent_downscale = 2 ** (len(vae.network.config.block_out_channels) - 1)
        self._load_text_encoders = load_text_encoders
        self._text_encoders: TextEncoders | None = None

    # ---- prompts

    @property
    def text_encoders(self) -> TextEncoders:
        """On the device; read from the checkpoint when they are not in memory."""
        if self._text_encoders is None:
            self._text_encoders = self._load_text_encoders()
        return self._text_encoders.to(self.device)

    def rest_text_encoders(self, *, keep: bool) -> None:
        """Off the device, when prompts are encoded: to the CPU's memory, or, without `keep`, out of it altogether."""
        if keep and self.device.type == "cpu":
            return  # they rest where they work
        if self._text_encoders is not None and keep:
            self._text_encoders.to(torch.device("cpu"))
        if not keep:
            self._text_encoders = None
        free_memory()

    # ---- the UNet

    def predict(self, x_vp: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's raw output (epsilon or v) [N, 4, h, w] in x_vp's dtype, with gradient where it is enabled.

        x_vp        [N, 4, h, w] noisy latent, variance-preserving: sqrt(alpha_cumprod) x_0 + sqrt(1 - ...) noise
        timesteps   [N] or 0-dim, 0 ... 999, whole or fractional
        """
        added = None
        if self.architecture == "sdxl":
            if conditioning.pooled is None or conditioning.size_ids is None:
                raise SpoError("An SDXL network needs pooled text features and size ids: encode prompts with it")
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
        parts = [self.vae, *({self.decoder} - {self.vae}), *([self._text_encoders] if self._text_encoders else [])]
        held = [tensor for tensor in (*self.unet.parameters(), *self.unet.buffers())]
        return sum(part.memory_bytes() for part in parts) + sum(t.numel() * t.element_size() for t in held)
