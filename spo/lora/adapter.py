"""LoRA adapters on a network, by peft: put in, switched off for the reference, taken out without a trace.

The reference of the SPO loss is the same network with its adapter off (or, when training goes on from a LoRA file,
with that file's weights in the adapter), never a copy of the network: a deliberate difference from the published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spo.errors import SpoError, nearest
from spo.lora.layer import LoraLayer
from spo.rng import generator

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer as PeftLayer
    from torch import Tensor, nn

NAME = "spo"

# kind of module -> endings of its name, in diffusers' and in ldm's / sgm's naming
MODULE_KINDS: dict[str, tuple[str, ...]] = {
    "attention": tuple(f".attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "feed-forward": (".ff.net.0.proj", ".ff.net.2"),
    "convolution": (".conv1", ".conv2", ".in_layers.2", ".out_layers.3"),
}


def modules_of_kinds(network: nn.Module, kinds: Sequence[str]) -> list[str]:
    """Full names of the Linear and Conv2d modules of `kinds` in a Stable Diffusion UNet, in the network's order.

    Raises SpoError for an unknown kind, or when the network has no such module.
    """
    import torch

    for kind in kinds:
        if kind not in MODULE_KINDS:
            raise SpoError(
                f'modules "{kind}" is not known; choose from {", ".join(MODULE_KINDS)}{nearest(kind, MODULE_KINDS)}.'
            )
    endings = tuple(ending for kind in kinds for ending in MODULE_KINDS[kind])
    found = [
        name
        for name, module in network.named_modules()
        if name.endswith(endings) and isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    if not endings or not found:
        raise SpoError(f"The network has no module of kinds {list(kinds)}; choose from {', '.join(MODULE_KINDS)}.")
    return found


class Adapter:
    """LoRA layers inside `network`, which is otherwise frozen. Weights are float32 whatever the network's dtype.

    Fresh layers start with a gaussian `down` (deviation 1 / rank) drawn from (seed, module name) and a zero `up`, so
    the network's output is bit for bit what it was. `remove()` leaves modules, flags and output as found.

    Raises SpoError when the network already carries an adapter of peft's.
    """

    def __init__(
        self,
        network: nn.Module,
        modules: Sequence[str],
        *,
        rank: int,
        alpha: float,
        seed: int = 0,
        start: Mapping[str, LoraLayer] | None = None,
    ) -> None:
        """modules  full names in `network`; `start`: weights for some of them (their own rank and alpha count), whose
        modules are added to `modules`."""
        from peft import LoraConfig, inject_adapter_in_model

        if hasattr(network, "peft_config"):
            raise SpoError("The network carries a peft adapter already; remove it first.")
        start = dict(start or {})
        self.network = network
        self.names = [name for name, _ in network.named_modules() if name in {*modules, *start}]
        self._originals = {name: network.get_submodule(name) for name in self.names}
        self._flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=list(self.names),
            rank_pattern={name: layer.down.shape[0] for name, layer in start.items()},
            alpha_pattern={name: layer.alpha for name, layer in start.items()},
            init_lora_weights="gaussian",
        )
        network.requires_grad_(False)
        inject_adapter_in_model(config, network, NAME)
        self.layers: dict[str, PeftLayer] = {name: network.get_submodule(name) for name in self.names}  # type: ignore[misc]
        self._scaling = {name: layer.scaling[NAME] for name, layer in self.layers.items()}
        self._initialise(start, seed)
        self._reference = {key: value.clone() for key, value in self.tensors().items()} if start else None

    def _initialise(self, start: Mapping[str, LoraLayer], seed: int) -> None:
        import torch

        for name, layer in self.layers.items():
            down, up = _weights(layer)
            if name in start:
                values = (start[name].down, start[name].up)
            else:
                noise = torch.randn(down.shape, generator=generator(seed, "lora", name))
                values = (noise / layer.r[NAME], torch.zeros(up.shape))
            for weight, value in zip((down, up), values, strict=True):
                weight.data = value.to(device=weight.device, dtype=torch.float32).reshape(weight.shape).clone()

    def parameters(self) -> list[nn.Parameter]:
        """The trained weights, down then up of each module, in the network's order."""
        return [weight for layer in self.layers.values() for weight in _weights(layer)]

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights themselves by name: `<module>.down`, `<module>.up`, detached, not copied."""
        return {
            f"{name}.{side}": weight.detach()
            for name, layer in self.layers.items()
            for side, weight in zip(("down", "up"), _weights(layer), strict=True)
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights in, by the names of `tensors()`. Raises SpoError when names or shapes differ."""
        mine = self.tensors()
        if mine.keys() != tensors.keys() or any(mine[key].shape != tensors[key].shape for key in mine):
            raise SpoError(
                "The saved LoRA weights do not fit this network's modules; resume with the run's own settings."
            )
        for key, value in mine.items():
            value.copy_(tensors[key])

    def weights(self) -> dict[str, LoraLayer]:
        """Module name -> its LoRA, on the CPU in float32, copies."""
        tensors = {key: value.detach().float().cpu().clone() for key, value in self.tensors().items()}
        return {
            name: LoraLayer(tensors[f"{name}.down"], tensors[f"{name}.up"], float(layer.lora_alpha[NAME]))
            for name, layer in self.layers.items()
        }

    def set_multiplier(self, multiplier: float) -> None:
        """How strongly the adapter acts: 1 as trained, 0 not at all; as `<lora:NAME:multiplier>` in the WebUI."""
        for name, layer in self.layers.items():
            layer.scaling[NAME] = self._scaling[name] * multiplier

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network without the adapter, bit for bit, while inside."""
        try:
            for layer in self.layers.values():
                layer.enable_adapters(False)
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The reference network while inside: adapter off, or the weights that training started from."""
        if self._reference is None:
            with self.off():
                yield
            return
        trained = [parameter.data for parameter in self.parameters()]
        try:
            for parameter, value in zip(self.parameters(), self._reference.values(), strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(self.parameters(), trained, strict=True):
                parameter.data = value

    def use_base_as_reference(self) -> None:
        """Compare with the bare checkpoint although training started from a LoRA file."""
        self._reference = None

    def remove(self) -> None:
        """Take the adapter out: the original modules, flags and attributes are back. Further calls do nothing."""
        for name, original in self._originals.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.network.get_submodule(parent), leaf, original)
        if self._originals:
            del self.network.peft_config
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        self._originals, self.layers = {}, {}


def _weights(layer: PeftLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """(down, up) of one of peft's LoRA layers."""
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight  # type: ignore[return-value]
