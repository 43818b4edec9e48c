"""A graphics card that is not there: real code runs on it with shapes only, in seconds and without memory.

    with imaginary_card() as device:
        network = network.half().to_empty(device=device)     # made on the meta device, outside
        network(torch.randn(2, 4, 128, 128).to(device, torch.float16)).sum().backward()

Python sees tensors on cuda:0. PyTorch's own code sees the meta device, which every build has, with autograd,
checkpointing and optimizers; neither CUDA nor a driver is asked for anything. (PyTorch's FakeTensorMode cannot do this:
autograd on its CUDA tensors ends the process where there is no CUDA.) Tensors in the host's memory are real.

What code asks of numbers is answered:

- Small tensors (KNOWN_BYTES) that follow from numbers which are known - noise levels, timesteps, indices - have their
  values.
- Of the others nothing is known: read one by one, a number is 1.0, an index 0. Two of them are different, `>`, `<` and
  the like hold, nothing is infinite or NaN. So checks for finite numbers pass, and every pair is kept.
- Large ones copied to the host are zeros, which take no memory before they are written to. So are, on the host itself,
  large random draws, copies, and products of large matrices.

What an unknown number decides in another way (`unique`, `repeat_interleave` by a tensor) raises an error. In `backward`
newer PyTorch does not ask the imaginary card about devices: what makes tensors there, and in checkpointed parts, must
make them like others (`x.new_zeros(...)`, not `zeros(..., device=x.device)`).
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spo.training.fused_attention import fused_attention, is_fused
from spo.training.storages import StorageFacts, tensors_in

KNOWN_BYTES = 2**14
LARGE = 2**16  # numbers; what is made of more of them on the host is zeros
CARD = torch.device("cuda", 0)
_META = torch.device("meta")
_HOST = torch.device("cpu")
_aten = torch.ops.aten


@contextmanager
def imaginary_card() -> Iterator[torch.device]:
    """While inside, "cuda" is the imaginary card, in this thread; gives its device.

    Modules: build them on the meta device before, then `to_empty(device=...)`; small ones may be moved as usual. Their
    tensors are of no use afterwards.
    """
    _let_optimizers_group(CardTensor)
    with _attention_on_card(), _Boundary(), _Card():
        yield CARD


class _Thread(threading.local):
    as_meta = False  # tensors on the card are what they are to PyTorch: in its own code, and for what is no card's


_thread = _Thread()


class CardTensor(Tensor):
    """A tensor on the imaginary card: a meta tensor that says it is on cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _META if _thread.as_meta else CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return not _thread.as_meta

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return _thread.as_meta

    def get_device(self) -> int:
        return 0


def _is_card(tensor: Tensor) -> bool:
    return type(tensor) is CardTensor or tensor.device.type == "meta"


@contextmanager
def _attention_on_card() -> Iterator[None]:
    """A function of its own and not the boundary's business: newer PyTorch leaves the boundary out in `backward`, where
    checkpointed parts are computed again."""
    usual = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        on_card = isinstance(query, CardTensor) and is_fused(query, key, value)
        return (fused_attention if on_card else usual)(query, key, value, *args, **kwargs)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def _let_optimizers_group(kind: type) -> None:
    """Optimizers update exact tensors on CUDA all at once, which takes more memory; so they shall on the card."""
    kinds = getattr(importlib.import_module("torch.optim.optimizer"), "_foreach_supported_types", None)
    if kinds is not None and kind not in kinds:
        kinds.append(kind)


# ---------------------------------------------------------------------------------------------- Python's side


class _Boundary(TorchFunctionMode):
    """What Python calls, before PyTorch's own code sees it: "cuda" becomes the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT_DEVICES:
            return func(*args, **kwargs)
        if func is torch._has_compatible_shallow_copy_type:  # whether a module may change a parameter in place
            old, new = args
            return isinstance(old, CardTensor) == isinstance(new, CardTensor) and func(old, new)
        if func is Tensor.backward:  # whose work may be to compute a checkpointed part again, on this side
            with self:
                return torch.autograd.backward(*args, **{_BACKWARD.get(name, name): kwargs[name] for name in kwargs})
        if func is Tensor.cuda:
            return args[0].to(_META)
        if func in _INITIALISERS and kwargs["tensor"].is_meta:  # numbers that nobody will know
            return kwargs["tensor"]
        if func is Tensor.pin_memory:  # for a card that is not there
            return args[0]
        if any(_is_meta_device(value) for value in (*args, kwargs.get("device"))):
            return _on_meta(func, args, kwargs)
        args = [_translated(value) for value in args]
        kwargs = {name: _translated(value) for name, value in kwargs.items()}
        if func in _FROM_NUMBERS:
            return _from_numbers(func, args, kwargs)
        return func(*args, **kwargs)


_ABOUT_DEVICES = (torch.device, torch._C._nn._parse_to)  # which give devices back
_INITIALISERS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)
_BACKWARD = {"gradient": "grad_tensors"}  # Tensor.backward's name -> torch.autograd.backward's
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


def _is_meta_device(value: Any) -> bool:
    return isinstance(value, torch.device | str) and str(value) == "meta"


def _on_meta(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What code itself asks of the meta device stays there, apart from the card."""
    before, _thread.as_meta = _thread.as_meta, True
    try:
        return func(*args, **kwargs)
    finally:
        _thread.as_meta = before


def _translated(value: Any) -> Any:
    if isinstance(value, torch.device):
        return _META if value.type == "cuda" else value
    return _META if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def _from_numbers(func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A tensor made on the host and moved, since PyTorch forgets the numbers where it makes one on the meta device."""
    if func is Tensor.new_tensor:
        like = args.pop(0)
        func, kwargs = torch.tensor, {"dtype": like.dtype, "device": _META if _is_card(like) else _HOST, **kwargs}
    if isinstance(args[0], Tensor):
        return func(*args, **kwargs)
    device = kwargs.pop("device", None) or _HOST
    return func(*args, **kwargs, device=_HOST).to(device)


# ---------------------------------------------------------------------------------------------- operators


class _Card(TorchDispatchMode):
    """Operators on the card, and between it and the host. Values: a storage's bytes, or one bool for all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.values: StorageFacts[Tensor | bool] = StorageFacts()
        self.layouts: dict[Any, Any] = {}  # of results that are new storages, by operator and arguments
        self.aliasing: set[Any] = set()  # operators whose results share or change an argument's storage
        self.calls = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper that sees to it takes as long as all the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _thread.as_meta:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            inputs = tensors_in(args, kwargs)
            device = kwargs.get("device")
            if not any(map(_is_card, inputs)) and (device is None or device.type != "meta"):
                return self._on_host(func, args, kwargs, inputs)
            if device is None and inputs and not any(isinstance(tensor, CardTensor) for tensor in inputs):
                return _on_meta(func, args, kwargs)  # the code's own meta tensors, apart from the card
            self.calls += 1
            if self.calls % 1000 == 0:
                self.values.sweep()
            answer = _ANSWERS.get(func.overloadpacket)
            if answer is not None:
                return answer(self, func, args, kwargs)
            if device is not None and device.type != "meta":
                return self._brought_to_host(self._run(func, args, {**kwargs, "device": _META}))
            return self._run(func, args, kwargs)

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor]) -> Any:
        """As it is, but what takes long or much memory."""
        packet = func.overloadpacket
        if torch.Tag.nondeterministic_seeded in func.tags:
            if func._schema.is_mutable and inputs[0].numel() > LARGE:
                return inputs[0]
            if packet in (_aten.randn, _aten.rand) and math.prod(args[0]) > LARGE:
                return _lazy_zeros(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if packet in _HEAVY and any(tensor.numel() > LARGE for tensor in inputs):
            kwargs = kwargs | ({"device": _META} if "device" in kwargs else {})
            shape = func(*_changed(args, _on_meta_device), **kwargs)
            return _lazy_zeros(shape.shape, shape.dtype).as_strided(shape.shape, shape.stride())
        return func(*args, **kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator's shapes, then its values where they are known."""
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        if not all(map(_is_card, written)):
            raise RuntimeError(f"{func} would write to the host's memory what is on the card")
        result = self._shapes(func, args, kwargs)
        if written:
            is_known = self._computed(func, args, kwargs) is not None
            for tensor in written:  # the check of gradients finds them finite, and so leaves its verdict as it was
                if not is_known and func.overloadpacket is not _aten._amp_foreach_non_finite_check_and_unscale_:
                    self.values.drop(tensor)
        elif func not in self.aliasing:
            self._learn(func, args, kwargs, tensors_in(result))
        return result

    def _learn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Tensor]) -> None:
        """The values of new tensors, where they are known or assumed."""
        value = None
        if all(item.dtype == torch.bool or item.numel() * item.element_size() <= KNOWN_BYTES for item in results):
            value = self._computed(func, args, kwargs)
        for item, real in zip(results, [None] * len(results) if value is None else tensors_in(value), strict=True):
            if real is not None:
                self._remember(item, real)
            elif item.dtype == torch.bool:
                self._assume(func, args, item)

    def _shapes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator's results without values. Slow, and networks repeat themselves: so known ones are copied."""
        key = (func, _description(args), _description(tuple(kwargs.items())))
        if key in self.layouts:
            layout = self.layouts[key]
            if layout is _FIRST:
                return args[0]
            return _dressed(layout.of(args[0])) if isinstance(layout, _View) else _made(layout)
        before, _thread.as_meta = _thread.as_meta, True
        try:
            result = func(
                *_changed(args, _shape_of), **{name: _changed(item, _shape_of) for name, item in kwargs.items()}
            )
        except NotImplementedError:
            if not func._schema.name.startswith(("aten::_foreach_", "aten::_fused_")):  # no shapes in PyTorch 2.1
                raise
            result = None if func._schema.is_mutable else [torch.empty_like(tensor) for tensor in args[0]]
        finally:
            _thread.as_meta = before
        inputs = tensors_in(args, kwargs)
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        if any(item.untyped_storage()._cdata in storages for item in tensors_in(result)):
            self.aliasing.add(func)
            if isinstance(result, Tensor) and isinstance(args[0], Tensor):
                if result is not args[0]:
                    if result.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
                        self.layouts[key] = _View.of_first(result, args[0])
                elif key[1] == _description(args):  # changed in place, and not in its shape
                    self.layouts[key] = _FIRST
            return _changed(result, lambda item: item if any(item is one for one in inputs) else _dressed(item))
        if _is_whole(result):
            self.layouts[key] = _changed(result, _layout_of)
        return _changed(result, _dressed)

    # ---- what a number, or the place of a tensor, decides

    def _number(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | int | float | complex:
        tensor = args[0]
        value = self._value(tensor)
        if value is not None:
            return value.item()
        return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 0

    def _equal(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        first, second = map(self._value, args)
        return args[0] is args[1] if first is None or second is None else torch.equal(first, second)

    def _nonzero(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self._places(args[0])

    def _masked_select(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._run(_aten.index.Tensor, (args[0], self._columns(args[1])), {})

    def _by_index(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        indices = [column for index in args[1] for column in self._columns(index)]
        return self._run(func, (args[0], indices, *args[2:]), kwargs)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_card(args[0]):
            return self._run(func, args, kwargs)
        value = self._value(args[1])
        return args[0] if value is None else args[0].copy_(value)

    def _places(self, mask: Tensor) -> Tensor:
        """`mask.nonzero()` on the card; of an unknown mask: all places."""
        value = self._value(mask)
        if value is None and mask.numel() * mask.ndim * 8 <= KNOWN_BYTES:
            value = torch.ones(mask.shape, dtype=torch.bool)
        places = None if value is None else value.nonzero()
        shape = (mask.numel(), mask.ndim) if places is None else places.shape
        result = _dressed(torch.empty(shape, dtype=torch.int64, device=_META))
        if places is not None:
            self._remember(result, places)
        return result

    def _columns(self, index: Tensor | None) -> list[Tensor | None]:
        """An index as integers: a mask is the places where it holds."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        return [_dressed(column) for column in self._places(index).unbind(1)]

    # ---- values

    def _value(self, tensor: Any) -> Tensor | None:
        """The tensor with its numbers, on the host; None when they are not known."""
        if not isinstance(tensor, Tensor) or not _is_card(tensor):
            return tensor
        fact = self.values.get(tensor)
        if fact is None:
            return None
        if isinstance(fact, bool):
            return torch.full((), fact).expand(tensor.shape)
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return torch.empty(0, dtype=tensor.dtype).set_(fact.untyped_storage(), *place)

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator's result by numbers, which it may change in place; None when an argument's are not known."""
        values = {id(tensor): self._value(tensor) for tensor in tensors_in(args, kwargs)}
        is_draw = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        if is_draw or func.overloadpacket in _EMPTY or any(value is None for value in values.values()):
            return None

        def real(item: Any) -> Any:
            return values[id(item)] if isinstance(item, Tensor) else _HOST if item == _META else item

        try:
            result = func(*_changed(args, real), **{name: _changed(item, real) for name, item in kwargs.items()})
        except (NotImplementedError, RuntimeError):  # the host does not have everything in half precision
            return None
        return () if result is None else result

    def _remember(self, tensor: Tensor, value: Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        if size <= KNOWN_BYTES:
            self.values.put(tensor, torch.zeros(size, dtype=torch.uint8))
            known = self._value(tensor)
            assert known is not None
            known.copy_(value)
        elif value.dtype == torch.bool and value.numel() and bool(value.all()) == bool(value.any()):
            self.values.put(tensor, bool(value.all()))

    def _assume(self, func: Any, args: tuple[Any, ...], result: Tensor) -> None:
        """What is taken to be true of numbers that nobody knows."""
        packet = func.overloadpacket
        if len(args) > 1 and args[0] is args[1]:
            self.values.put(result, packet in (_aten.eq, _aten.le, _aten.ge))
        elif packet in _HOLDS or packet in _FAILS:
            self.values.put(result, packet in _HOLDS)

    def _brought_to_host(self, tensor: Tensor) -> Tensor:
        value = self._value(tensor)
        if value is not None:
            return value.clone()
        if tensor.numel() * tensor.element_size() > KNOWN_BYTES or not tensor.dtype.is_floating_point:
            return _lazy_zeros(tensor.shape, tensor.dtype)
        return torch.ones(tensor.shape, dtype=tensor.dtype)


_ANSWERS = {
    _aten._local_scalar_dense: _Card._number,
    _aten.equal: _Card._equal,
    _aten.nonzero: _Card._nonzero,
    _aten.masked_select: _Card._masked_select,
    _aten.copy_: _Card._copy,
    **dict.fromkeys(
        (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index), _Card._by_index
    ),
}
_HEAVY = (_aten._to_copy, _aten.clone, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution)
_EMPTY = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)
_HOLDS = (_aten.lt, _aten.le, _aten.gt, _aten.ge, _aten.ne, _aten.all)
_FAILS = (_aten.eq, _aten.isnan, _aten.isinf, _aten.any)


# ---------------------------------------------------------------------------------------------- small parts


def _changed(item: Any, change: Callable[[Any], Any]) -> Any:
    """`change` of everything in lists and tuples."""
    if type(item) in (list, tuple):
        return type(item)(_changed(part, change) for part in item)
    return change(item)


def _shape_of(item: Any) -> Any:
    """A real tensor as PyTorch's shape code wants it; single numbers as they are, for the rules of dtypes."""
    if isinstance(item, Tensor) and item.ndim and not _is_card(item):
        return _on_meta_device(item)
    return None if isinstance(item, torch.Generator) else item


def _on_meta_device(item: Any) -> Any:
    if isinstance(item, Tensor):
        return torch.empty_strided(item.size(), item.stride(), dtype=item.dtype, device=_META)
    return item


def _dressed(item: Any) -> Any:
    if isinstance(item, Tensor) and not isinstance(item, CardTensor):
        return torch.Tensor._make_subclass(CardTensor, item)  # type: ignore[attr-defined]
    return item


@dataclass(frozen=True)
class _Layout:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _View:
    """Of an operator's first argument; offset: from where that begins in its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of_first(cls, view: Tensor, first: Tensor) -> _View:
        return cls(view.size(), view.stride(), int(view.storage_offset() - first.storage_offset()))

    def of(self, first: Tensor) -> Tensor:
        return first.as_strided(self.size, self.stride, first.storage_offset() + self.offset)


_FIRST = "the operator's first argument itself"


def _layout_of(item: Any) -> Any:
    return _Layout(item.size(), item.stride(), item.dtype) if isinstance(item, Tensor) else item


def _made(layout: Any) -> Any:
    """New tensors on the card in place of layouts."""
    if isinstance(layout, _Layout):
        empty = torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device=_META)
        return torch.Tensor._make_subclass(CardTensor, empty)  # type: ignore[attr-defined]
    return type(layout)(map(_made, layout)) if type(layout) in (list, tuple) else layout


def _is_whole(result: Any) -> bool:
    """Whether layouts say all of it: every tensor has a storage of its own, which it fills."""
    tensors = tensors_in(result)
    storages = {item.untyped_storage()._cdata for item in tensors}
    return len(storages) == len(tensors) and all(
        item.untyped_storage().nbytes() == _made(_layout_of(item)).untyped_storage().nbytes() for item in tensors
    )


def _description(item: Any) -> Any:
    """Something to look an argument up by: of a tensor all that shapes depend on."""
    if isinstance(item, Tensor):
        return (item.size(), item.stride(), item.dtype)
    if type(item) in (list, tuple):
        return tuple(map(_description, item))
    return None if isinstance(item, torch.Generator) else (type(item), item)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes in place."""
    arguments = func._schema.arguments
    given = {**dict(zip([argument.name for argument in arguments], args, strict=False)), **kwargs}
    return tensors_in([given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write])


def _lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the host that take no memory before they are written to."""
    import numpy

    count = math.prod(shape)
    if not count:
        return torch.zeros(*shape, dtype=dtype)
    return torch.from_numpy(numpy.zeros(count * dtype.itemsize, numpy.uint8)).view(dtype).reshape(shape)
