"""The seam to the WebUIs with a package `backend`: Forge, and Forge Classic's branch neo.

The same surface as `a1111`, from where all comes that works there unchanged; the files beside have what differs: lazy
loading, tensors of inference mode, weights that are moved and merged as sampling needs them.
"""

# mypy: disable-error-code="assignment"

from spo.webui import a1111
from spo.webui.a1111 import *
from spo.webui.forge.borrowing import (
    pinned,
    trainable,
)
from spo.webui.forge.checkpoint import (
    Checkpoint,
    chosen_checkpoint,
    glance,
    is_loaded,
    load_afresh,
    load_again,
    load_checkpoint,
    loaded_checkpoint,
    other_left_loaded,
    refuse_training,
    swap_back,
    tensors_of,
)
from spo.webui.forge.loop import (
    predictions_shifted,
    script_class,
)
from spo.webui.forge.network import (
    compute_dtype,
    denoiser,
    evaluate,
    network_to_card,
    weights_in_float8,
)
from spo.webui.forge.pictures import (
    repeat_arguments,
    txt2img,
)
from spo.webui.forge.prompts import (
    activate_networks,
    encode_prompts,
)
from spo.webui.forge.vae import (
    bad_vae_text,
    decode,
    encode,
)
from spo.webui.forked import (
    autocast,
    has_moved,
    keep_adapter_precision,
    refuse_demo,
    set_gradient_checkpointing,
)

__all__ = a1111.__all__
