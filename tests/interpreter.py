"""Gluon's kernels on a CPU: their functions run as Python on torch's tensors, each group of warps in a thread.

Triton's interpreter does that for Triton's own language only. This one is stricter than hardware where hardware lets
mistakes pass: a product is formed when it is waited for, not when it is started, from what its operands in shared
memory are by then; whoever changes a barrier lets the other threads come as far as they can; shared memory starts as
NaN; and threads that all wait for each other raise.
"""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_here = threading.local()  # the thread's program, and its products under way
_known: dict[Any, Callable[..., Any]] = {}


def run(kernel: Any, grid: Sequence[int], arguments: dict[str, Any]) -> None:
    """Run a kernel for a grid of one dimension, one program after the other."""
    names = kernel.arg_names
    values = [_argument(arguments[name]) for name in names]
    for i in range(grid[0]):
        _here.program, _here.products = Program(_value(torch.tensor(i)), grid[0]), []
        _interpreted(kernel)(*values)


class Value(Tensor):
    """A tensor in registers: `x += y` makes another one, and who else has the first keeps it."""

    def __iadd__(self, other: Any) -> Any:
        return self + other

    def __isub__(self, other: Any) -> Any:
        return self - other

    def __ixor__(self, other: Any) -> Any:
        return self ^ other


class Deadlock(RuntimeError):
    """All threads of a program wait, each for another."""


@dataclass
class Program:
    """What the threads of one program share. Whoever changes a barrier or waits for one holds `changed`."""

    number: Tensor
    of: int = 1
    changed: threading.Condition = field(default_factory=threading.Condition)
    running: int = 1
    giving_way: int = 0
    waiting: list[tuple[Barrier, int]] = field(default_factory=list)
    failure: BaseException | None = None

    def wait(self, barrier: Barrier, phase: int) -> None:
        with self.changed:
            entry = barrier, phase
            self.waiting.append(entry)
            self.changed.notify_all()
            while not barrier.is_through(phase):
                if self.failure is None and self._stuck() == self.running:
                    self.failure = Deadlock(f"{self.running} threads wait for each other")
                if self.failure is not None:
                    self.changed.notify_all()
                    raise self.failure
                self.changed.wait()
            self.waiting.remove(entry)

    def give_way(self) -> None:
        """Let the other threads come as far as they can: the worst that may happen after a barrier was changed."""
        with self.changed:
            self.giving_way += 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.failure or self._stuck() + self.giving_way >= self.running)
            self.giving_way -= 1

    def _stuck(self) -> int:
        return sum(not barrier.is_through(phase) for barrier, phase in self.waiting)

    def specialize(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Run each function in a thread of its own."""
        self.running = len(parts)
        threads = [threading.Thread(target=self._part, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _part(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _here.program, _here.products = self, []
        try:
            with torch.no_grad():  # which is a thread's own
                function(*arguments)
            assert not any(product.value is None for product in _here.products), "a product is never waited for"
        except BaseException as error:
            with self.changed:
                self.failure = self.failure or error
        finally:
            with self.changed:
                self.running -= 1
                self.changed.notify_all()


@dataclass(eq=False)
class Barrier:
    """A phase is over when as many have arrived as are expected, and all bytes."""

    arrivals: int
    missing: int
    n_bytes: int = 0
    phase: int = 0

    def is_through(self, phase: int) -> bool:
        return self.phase != phase

    def change(self, arrived: int, n_bytes: int) -> None:
        program = _here.program
        with program.changed:
            self.missing -= arrived
            self.n_bytes += n_bytes
            assert self.missing >= 0, "more arrive than the barrier was made for"
            if self.missing == 0 and self.n_bytes == 0:
                self.missing, self.phase = self.arrivals, self.phase ^ 1
                program.changed.notify_all()
        program.give_way()


@dataclass
class Barriers:
    bars: list[Barrier | None]

    def index(self, i: Any) -> _Room:
        return _Room(self.bars, int(i))


@dataclass
class _Room:
    """Where a barrier is, or will be."""

    bars: list[Barrier | None]
    i: int

    @property
    def barrier(self) -> Barrier:
        barrier = self.bars[self.i]
        assert barrier is not None, "no barrier was made here"
        return barrier


class Shared:
    """Shared memory; views of it see what is written later."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.dtype, self.shape = memory, memory.dtype, list(memory.shape)

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.shape[0], "beyond shared memory"
        return Shared(self.memory[int(i)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.memory.view(shape))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory.permute(order))

    def load(self, layout: Any) -> Tensor:
        return _value(self.memory.clone())

    def store(self, value: Tensor) -> None:
        self.memory.copy_(value)


class Descriptor:
    """A tensor that is copied tile by tile; what is outside of it reads as zero."""

    def __init__(self, given: TensorDescriptor) -> None:
        base = given.base
        self.tensor = torch.as_strided(base, given.shape, given.strides, base.storage_offset())
        self.shape, self.block_shape, self.layout = list(given.shape), list(given.block_shape), given.layout
        self.dtype = base.dtype

    def tile(self, place: list[Any]) -> Tensor:
        tile = torch.zeros(self.block_shape, dtype=self.dtype)
        ends = [min(int(i) + n, size) for i, n, size in zip(place, self.block_shape, self.shape, strict=True)]
        found = self.tensor[tuple(slice(int(i), end) for i, end in zip(place, ends, strict=True))]
        if found.numel():
            tile[tuple(slice(0, size) for size in found.shape)] = found
        return tile


@dataclass
class Pointer:
    """Places in a tensor's memory."""

    memory: Tensor
    place: Any = 0

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.place + other)


@dataclass(eq=False)
class Product:
    """`a b + total`, formed by `finish`."""

    a: Any
    b: Any
    total: Any
    value: Tensor | None = None

    def finish(self) -> Tensor:
        if self.value is None:
            total = self.total.value if isinstance(self.total, Product) else self.total
            assert total is not None, "a product adds to one that was started later"
            self.value = total + _memory(self.a).float() @ _memory(self.b).float()
        return self.value


def _memory(operand: Any) -> Tensor:
    return operand.memory if isinstance(operand, Shared) else operand


def _argument(given: Any) -> Any:
    if isinstance(given, TensorDescriptor):
        return Descriptor(given)
    if isinstance(given, Tensor):
        return Pointer(torch.as_strided(given, (given.untyped_storage().nbytes() // given.itemsize,), (1,), 0),
                       given.storage_offset())  # fmt: skip
    if hasattr(given, "ptr"):
        return types.SimpleNamespace(**given._asdict() | {"ptr": _argument(given.ptr)})
    return given


def _interpreted(function: Any) -> Callable[..., Any]:
    """A function of Gluon's as one of Python, in which the language's names are those of this file."""
    if function not in _known:
        source, own = function.fn.__code__, function.fn.__globals__
        names: dict[str, Any] = {"__builtins__": __builtins__, "range": _range}
        _known[function] = types.FunctionType(source, names, function.fn.__name__, function.fn.__defaults__)
        names.update({name: _replaced(name, own[name]) for name in _names(source) if name in own})
    return _known[function]


def _names(source: types.CodeType) -> set[str]:
    inner = [_names(part) for part in source.co_consts if isinstance(part, types.CodeType)]
    return set(source.co_names).union(*inner)


def _replaced(name: str, value: Any) -> Any:
    if name in _LANGUAGE:
        return _LANGUAGE[name]
    if isinstance(value, gluon._runtime.GluonJITFunction):
        return _interpreted(value)
    return value.value if isinstance(value, gl.constexpr) else value


def _start_product(a: Any, b: Any, total: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, total if use_acc else torch.zeros_like(total))
    _here.products.append(product)
    return product if is_async else _wait_for_products(0, [product])


def _wait_for_products(under_way: int, products: list[Product]) -> Any:
    """All but so many of those started last are formed; each of `products` has to be by then."""
    number = max(len(_here.products) - under_way, 0)
    for product in _here.products[:number]:
        product.finish()
    _here.products = _here.products[number:]
    found = tuple(product.value for product in products)
    assert not any(value is None for value in found), "a product is used while it is under way"
    return found if len(found) > 1 else found[0]


def _copy(tensor: Descriptor, place: list[Any], bar: _Room, room: Shared) -> None:
    tile = tensor.tile(place)
    room.store(tile)
    bar.barrier.change(0, -tile.numel() * tile.element_size())


def _write_tile(tensor: Descriptor, place: list[Any], room: Shared) -> None:
    found = tensor.tensor[tuple(slice(int(i), int(i) + n) for i, n in zip(place, tensor.block_shape, strict=True))]
    found.copy_(room.memory[tuple(slice(0, size) for size in found.shape)])


def _load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
    place, mask = torch.broadcast_tensors(torch.as_tensor(pointer.place), torch.as_tensor(mask))
    assert ((place >= 0) & (place < len(pointer.memory)) | ~mask).all(), "read outside of the tensor"
    return _value(torch.where(mask, pointer.memory[torch.where(mask, place, 0)], other))


def _store(pointer: Pointer, value: Tensor, mask: Any = True) -> None:
    place, mask, value = torch.broadcast_tensors(torch.as_tensor(pointer.place), torch.as_tensor(mask), value)
    place = place[mask]
    assert ((place >= 0) & (place < len(pointer.memory))).all(), "written outside of the tensor"
    pointer.memory[place] = value[mask].to(pointer.memory.dtype)


def _room(dtype: Any, shape: list[int], layout: Any) -> Any:
    if dtype == torch.int64:
        return Barriers([None] * shape[0])
    return Shared(torch.full(shape, math.nan, dtype=dtype))


def _init(room: _Room, count: int) -> None:
    room.bars[room.i] = Barrier(count, count)


def _range(*bounds: Any) -> Iterator[Value]:
    """Numbers of a loop, in registers too."""
    return (_value(torch.tensor(i)) for i in range(*map(int, bounds)))


def _value(x: Tensor) -> Value:
    return x.as_subclass(Value)


def _both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda a, b: _value(function(torch.as_tensor(a), torch.as_tensor(b)))


def _hold(said: bool) -> None:
    assert said


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Layouts: which thread has what."""


_MBARRIER = types.SimpleNamespace(
    MBarrierLayout=_nothing,
    init=_init,
    expect=lambda room, n_bytes: room.barrier.change(1, n_bytes),
    arrive=lambda room, count: room.barrier.change(count, 0),
    wait=lambda room, phase: _here.program.wait(room.barrier, int(phase)),
)
_TMA = types.SimpleNamespace(async_copy_shared_to_global=_write_tile, store_wait=_nothing)
_GL = types.SimpleNamespace(
    int64=torch.int64, int32=torch.int32, float32=torch.float32,
    NVMMADistributedLayout=_nothing, DotOperandLayout=_nothing, SliceLayout=_nothing, BlockedLayout=_nothing,
    program_id=lambda axis: _here.program.number, num_programs=lambda axis: _here.program.of,
    static_range=range, static_assert=_hold,
    cdiv=lambda a, b: -(-a // b),
    arange=lambda begin, end, layout: _value(torch.arange(begin, end)),
    zeros=lambda shape, dtype, layout: _value(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, value, dtype, layout: _value(torch.full(shape, value, dtype=dtype)),
    zeros_like=torch.zeros_like, full_like=lambda x, value: torch.full_like(x, float(value)),
    expand_dims=torch.unsqueeze, join=lambda a, b: torch.stack((a, b), -1),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    minimum=_both(torch.minimum), maximum=_both(torch.maximum), where=torch.where,
    sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis), exp2=torch.exp2, log=torch.log,
    fma=lambda a, b, c: a * b + c, load=_load, store=_store, allocate_shared_memory=_room,
    warp_specialize=lambda parts, warps, registers: _here.program.specialize(parts),
)  # fmt: skip
_LANGUAGE: dict[str, Any] = {
    "gl": _GL, "mbarrier": _MBARRIER, "tma": _TMA, "copy": _copy, "fence_async_shared": _nothing,
    "warpgroup_mma": _start_product, "warpgroup_mma_wait": _wait_for_products,
    # In registers a loop carries halves as pairs in integers; here nothing is carried.
    "floats": lambda x: x.float(), "minus": lambda x: -x,
    "pack": lambda x, dtype: x.to(dtype), "unpack": lambda x, dtype, layout: x,
}  # fmt: skip
