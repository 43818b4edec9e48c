"""What WebUIs of the Forge kind do to a network otherwise than AUTOMATIC1111's, and how it is trained all the same.

For the seam's folders of such WebUIs alone; like `a1111` it imports where there is no WebUI. They load and sample under
`inference_mode`, whose tensors autograd refuses; some of them have a Linear of their own and blocks that add in place;
and they merge LoRAs into the weights by the names of modules, among which an adapter of ours would stand in the way.
"""

from spo.webui.forked.checkpointing import set_gradient_checkpointing
from spo.webui.forked.demo import refuse_demo
from spo.webui.forked.inference import ordinary, ordinary_weights, outside_inference
from spo.webui.forked.layers import adding_in_place, linear_for_peft
from spo.webui.forked.loras import activate_networks, active_networks
from spo.webui.forked.patching import adapters_aside, plain_names_in
from spo.webui.forked.running import autocast, has_moved, keep_adapter_precision

__all__ = [
    "activate_networks",
    "active_networks",
    "adapters_aside",
    "adding_in_place",
    "autocast",
    "has_moved",
    "keep_adapter_precision",
    "linear_for_peft",
    "ordinary",
    "ordinary_weights",
    "outside_inference",
    "plain_names_in",
    "refuse_demo",
    "set_gradient_checkpointing",
]
