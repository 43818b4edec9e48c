"""The seam to reForge and to Forge classic, forks of AUTOMATIC1111's WebUI with the package `ldm_patched`.

The same names as `a1111`'s, and most of them the same functions: pages, queue, progress and prompts are A1111's there.
Other here are the network, which lives in `forge_objects`, is moved and cast by their own management, and gets LoRAs as
patches of its weights; and sampling, which goes on under `inference_mode` and asks no callback for predictions.
"""

# mypy: disable-error-code="assignment"

from spo.webui import a1111
from spo.webui.a1111 import *
from spo.webui.forked import (
    autocast,
    has_moved,
    keep_adapter_precision,
    refuse_demo,
    set_gradient_checkpointing,
)
from spo.webui.reforge.borrowing import pinned, trainable
from spo.webui.reforge.checkpoint import chosen_checkpoint, loaded_checkpoint, refuse_training
from spo.webui.reforge.loop import predictions_shifted, script_class
from spo.webui.reforge.loras import refresh_loras
from spo.webui.reforge.network import (
    compute_dtype,
    denoiser,
    evaluate,
    network_to_card,
    weights_in_float8,
)
from spo.webui.reforge.pictures import txt2img
from spo.webui.reforge.prompts import activate_networks, encode_prompts
from spo.webui.reforge.vae import decode, encode

__all__ = a1111.__all__
