"""Peak memory of real code, counted as it runs: on the imaginary card in seconds, or with real tensors.

    with imaginary_card() as device, Ruler(device.type) as ruler:
        network = network.half().to_empty(device=device)
        ruler.weights(network)
        with ruler.phase("training"):
            ...
    print(ruler.phases["training"].total_gib)

Counted are tensors, from the operator that makes them until nobody holds them any more. Beside them a card needs
room for what kernels work with while they run, which a phase's record tells apart, and for its driver and allocator,
which are constants here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spo.training.storages import StorageFacts, tensors_in

GIB = 2**30

# Room for a convolution to work in, as a multiple of its input and output: cuDNN computes channels-last, and copies
# both. With it the decode of a picture, weights of the VAE included, comes to 2.53 GiB (SDXL 1024 px, float16), 5.06
# (float32) and 1.50 (SD1.5 512 px, float32). Reserved on cards were 3232, 5568 and 1696 MB (InvokeAI, pull request
# 7674); the rest is the allocator's.
CONVOLUTION_WORKSPACE = 1.0

# What the allocator holds beyond tensors and workspaces, as a share of them: pieces that nothing fits into. By the same
# three measurements 0.03 to 0.26.
ALLOCATOR_SHARE = 0.15

# CUDA's context with PyTorch's kernels (0.3 to 0.5 GiB, by card and version) and cuBLAS's workspace.
CONTEXT_GIB = 0.6


@dataclass(frozen=True)
class Peak:
    """The most memory that was needed at one time.

    weights_bytes    of modules named to `Ruler.weights`, on the device at that time
    tensors_bytes    of everything else
    workspace_bytes  how much higher the peak is with what convolutions need while they run
    """

    weights_bytes: int = 0
    tensors_bytes: int = 0
    workspace_bytes: int = 0

    @property
    def total_gib(self) -> float:
        """All three in GiB."""
        return (self.weights_bytes + self.tensors_bytes + self.workspace_bytes) / GIB

    @property
    def card_gib(self) -> float:
        """What a card must have free, in GiB: the total, ALLOCATOR_SHARE and CONTEXT_GIB."""
        return self.total_gib + ALLOCATOR_SHARE * (self.tensors_bytes + self.workspace_bytes) / GIB + CONTEXT_GIB


@dataclass
class Rise:
    """Bytes above what was there before: of tensors, and of tensors and workspaces."""

    tensors_bytes: int = 0
    with_workspace_bytes: int = 0


@dataclass
class _Storage:
    """One storage on the device; what was there before is not counted."""

    size_bytes: int
    is_weight: bool
    is_counted: bool


class Ruler(TorchDispatchMode):
    """Counts the bytes of tensors made on one kind of device while inside; views share, what dies is taken off.

    device  "cuda" or "cpu"; what is on the other is not counted, such as weights parked in the host's memory. Two
            rulers, one inside the other, measure both
    phases  name -> highest Peak in phases of that name

    Enter it inside `imaginary_card`, if there is one. Storages that exist already are never counted, but as weights.
    Exact for some hundreds of storages; with more, the dead ones are looked for less often, and the peak may be told
    up to SLACK too high.
    """

    SLACK = 0.005
    _NEWEST = 256  # storages that are looked through at every possible peak

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self._device = device
        self.phases: dict[str, Peak] = {}
        self._storages: StorageFacts[_Storage] = StorageFacts()
        self._tensors = self._weights = 0  # bytes; some may be of storages that have died
        self._in_phase = False
        self._swept = 0  # bytes of both after all storages were looked through
        self.reset_peak()

    @property
    def current_bytes(self) -> int:
        """Of the tensors now on the device, weights not among them."""
        self._sweep(None)
        return self._tensors

    @property
    def weights_bytes(self) -> int:
        """Of the weights now on the device."""
        self._sweep(None)
        return self._weights

    @property
    def peak(self) -> Peak:
        """Since the beginning, or `reset_peak`."""
        higher = max(0, self._peak_with_workspace - self._peak.weights_bytes - self._peak.tensors_bytes)
        return Peak(self._peak.weights_bytes, self._peak.tensors_bytes, higher)

    @property
    def peak_bytes(self) -> int:
        """Of tensors without weights and workspaces, when tensors and weights together were most."""
        return self._peak.tensors_bytes

    def reset_peak(self) -> None:
        """Begin anew with what is on the device now."""
        self._sweep(None)
        self._peak = Peak(self._weights, self._tensors)
        self._peak_with_workspace = self._weights + self._tensors

    def weights(self, module: nn.Module) -> None:
        """Count a module's parameters and buffers on the device as weights from now on. Again after it has moved."""
        for tensor in (*module.parameters(), *module.buffers()):
            if self._is_here(tensor):
                self._forget(tensor)
                self._count(tensor, is_weight=True)
        self._note(0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The peak inside goes to `phases[name]`, and to the ruler's own; a phase within a phase counts for itself."""
        before, before_with_workspace, is_outer = self._peak, self._peak_with_workspace, not self._in_phase
        self.reset_peak()
        self._in_phase = True
        try:
            yield
        finally:
            self.phases[name] = max(self.phases.get(name, Peak()), self.peak, key=lambda peak: peak.total_gib)
            if is_outer:
                self._in_phase = False
                before = max(before, self._peak, key=lambda peak: peak.total_gib)
                before_with_workspace = max(before_with_workspace, self._peak_with_workspace)
            self._peak, self._peak_with_workspace = before, before_with_workspace

    @contextmanager
    def rise(self) -> Iterator[Rise]:
        """How far memory rises inside above what is there at the beginning; known afterwards."""
        before, before_with_workspace, rise = self._peak, self._peak_with_workspace, Rise()
        self.reset_peak()
        start_bytes = self._peak_with_workspace
        yield rise
        rise.tensors_bytes = self._peak.weights_bytes + self._peak.tensors_bytes - start_bytes
        rise.with_workspace_bytes = self._peak_with_workspace - start_bytes
        self._peak = max(before, self._peak, key=lambda peak: peak.weights_bytes + peak.tensors_bytes)
        self._peak_with_workspace = max(before_with_workspace, self._peak_with_workspace)

    def note(self, rise: Rise) -> None:
        """Count a rise once more, above what is there now."""
        self._sweep(None)
        now = Peak(self._weights, self._tensors + rise.tensors_bytes)
        self._peak = max(self._peak, now, key=lambda peak: peak.weights_bytes + peak.tensors_bytes)
        total = self._weights + self._tensors + rise.with_workspace_bytes
        self._peak_with_workspace = max(self._peak_with_workspace, total)

    # ---- counting

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # for speed, as on the imaginary card

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            for tensor in tensors_in(args, kwargs):
                if self._storages.get(tensor) is None:
                    self._storages.put(tensor, _Storage(0, False, False))
            result = func(*args, **kwargs)
            for tensor in tensors_in(result):
                fact = self._storages.get(tensor)
                if fact is None and self._is_here(tensor):
                    self._count(tensor, is_weight=False)
                elif fact is not None and fact.is_counted and fact.size_bytes != tensor.untyped_storage().nbytes():
                    self._forget(tensor)
                    self._count(tensor, is_weight=fact.is_weight)
            self._note(self._workspace(func, args, result))
        return result

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device

    def _count(self, tensor: Tensor, is_weight: bool) -> None:
        size = tensor.untyped_storage().nbytes()
        self._storages.put(tensor, _Storage(size, is_weight, True))
        self._add(size, is_weight)

    def _forget(self, tensor: Tensor) -> None:
        fact = self._storages.get(tensor)
        if fact is not None:
            self._add(-fact.size_bytes, fact.is_weight)
            self._storages.drop(tensor)

    def _add(self, size: int, is_weight: bool) -> None:
        if is_weight:
            self._weights += size
        else:
            self._tensors += size

    def _sweep(self, newest: int | None) -> None:
        for fact in self._storages.sweep(newest):
            self._add(-fact.size_bytes, fact.is_weight)
        if newest is None:
            self._swept = self._weights + self._tensors

    def _note(self, workspace: int) -> None:
        """Whether this is a peak. Storages that died are still counted, so look again before it is taken for one."""
        if not self._is_peak(workspace):
            return
        self._sweep(self._NEWEST)
        if self._is_peak(workspace) and self._weights + self._tensors > self._swept * (1 + self.SLACK):
            self._sweep(None)
        total = self._weights + self._tensors
        if total > self._peak.weights_bytes + self._peak.tensors_bytes:
            self._peak = Peak(self._weights, self._tensors)
        self._peak_with_workspace = max(self._peak_with_workspace, total + workspace)

    def _is_peak(self, workspace: int) -> bool:
        total = self._weights + self._tensors
        return (
            total > self._peak.weights_bytes + self._peak.tensors_bytes or total + workspace > self._peak_with_workspace
        )

    def _workspace(self, func: Any, args: tuple[Any, ...], result: Any) -> int:
        """Bytes that a convolution on a card needs while it runs, forward or backward."""
        if self._device != "cuda" or func.overloadpacket not in _CONVOLUTIONS:
            return 0
        return int(CONVOLUTION_WORKSPACE * (_bytes(args[0]) + _bytes(tensors_in(result)[0])))


_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
