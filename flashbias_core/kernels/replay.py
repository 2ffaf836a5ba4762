"""Passes like one that was made before are made again: the same launches, past all that finds and describes them.

A pass makes tensors from tensors, by launches alone: each of its kernels' arguments that is a tensor is one of its
inputs or a `room`. Then all but the tensors themselves is the same whenever inputs lie in memory alike. A pass of which
that is not so, for it asks torch for something between, is made in the long way each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .layout import geometry

PASSES = 2048  # at most, each of a few kilobytes
PLAIN = {type(None), bool, int, float, str}
_passes: dict[Hashable, Pass | None] = {}
_thread = threading.local()

Make = Callable[[list[Any]], Any]
Description = tuple[type, dict[str, Any]]


def repeated(key: Hashable, inputs: Sequence[Tensor | None], make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What `make()` gives, which makes it of `inputs`, the first of them not None.

    `key` has to say all that this depends on beside the inputs and how they lie.
    """
    key = key, *[None if tensor is None else geometry(tensor) for tensor in inputs]
    known = _passes.get(key)
    if known is not None:
        return known(inputs)
    if key in _passes:
        return make()
    _thread.recorder = recorder = Recorder(inputs)
    try:
        results = make()
    finally:
        _thread.recorder = None
    if len(_passes) >= PASSES:
        _passes.clear()
    _passes[key] = recorder.recorded(results)
    return results


def room(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, *, zeros: bool = False) -> Tensor:
    """Memory beside `like`, in its dtype or another, that kernels fill; some only in part, and need zeros."""
    tensor = (like.new_zeros if zeros else like.new_empty)(shape, dtype=dtype)
    recorder = getattr(_thread, "recorder", None)
    if recorder is not None:
        recorder.rooms.append((tensor, zeros))
    return tensor


def note(run: Callable[..., Any], arguments: list[Any]) -> None:
    """Note a launch, `run(*arguments)`, of the pass that is being made, if one is."""
    recorder = getattr(_thread, "recorder", None)
    if recorder is not None:
        recorder.launches.append((run, arguments))


def forget() -> None:
    """Make all passes in the long way once more."""
    _passes.clear()


def without_tensor(descriptor: Any) -> Description:
    """The type of a tensor descriptor, and all of it but the tensor, which shall not be kept."""
    return type(descriptor), {name: value for name, value in vars(descriptor).items() if name != "base"}


def with_tensor(description: Description, tensor: Tensor) -> Any:
    """The tensor descriptor of a tensor that lies like another's, unchecked."""
    kind, fields = description
    descriptor = object.__new__(kind)
    vars(descriptor).update(fields, base=tensor)
    return descriptor


def _like(room: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    return room if room.shape == shape and room.stride() == stride else room.as_strided(shape, stride)


@dataclass
class Pass:
    """How to make a pass again, from a list of objects that grows: inputs, rooms, and what is made of them.

    rooms: shapes, strides, dtypes, and whether they are filled with zeros. made: how to make what launches take beside
    tensors, from the objects before it. launches: what to call, its arguments, and the places among them of which
    objects. results: which objects, with shape and strides.
    """

    rooms: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]]
    made: list[Make]
    launches: list[tuple[Callable[..., Any], list[Any], list[tuple[int, int]]]]
    results: list[tuple[int, torch.Size, tuple[int, ...]]]

    def __call__(self, inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
        first = inputs[0]
        assert first is not None
        objects: list[Any] = [*inputs]
        for shape, stride, dtype, zeros in self.rooms:
            space = first.new_empty_strided(shape, stride, dtype=dtype)  # half of what `new_empty` takes the host
            objects.append(space.zero_() if zeros else space)
        for make in self.made:
            objects.append(make(objects))
        for run, arguments, places in self.launches:
            values = arguments.copy()
            for place, number in places:
                values[place] = objects[number]
            run(*values)
        return [_like(objects[number], shape, stride) for number, shape, stride in self.results]


class Recorder:
    """Notes rooms and launches of the pass that is being made."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = inputs
        self.rooms: list[tuple[Tensor, bool]] = []
        self.launches: list[tuple[Callable[..., Any], list[Any]]] = []

    def recorded(self, results: Sequence[Tensor]) -> Pass | None:
        """The pass; None where it cannot be made again."""
        tensors = [*self.inputs, *(room for room, _ in self.rooms)]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        given = [address for address in addresses if address is not None]
        if not self.launches or len(set(given)) < len(given):  # or it is not known which tensor is meant
            return None
        finder = _Finder(tensors, addresses)
        try:
            launches = [(run, *finder.arguments(values)) for run, values in self.launches]
            found = [(finder.room(result), result.shape, result.stride()) for result in results]
        except KeyError:
            return None
        return Pass(
            [(tuple(room.shape), room.stride(), room.dtype, zeros) for room, zeros in self.rooms],
            finder.made, launches, found,
        )  # fmt: skip


class _Finder:
    """Finds tensors of a pass, by their addresses, in what launches took."""

    def __init__(self, tensors: list[Tensor | None], addresses: list[int | None]) -> None:
        self.tensors, self.made = tensors, list[Make]()
        self._numbers = {address: number for number, address in enumerate(addresses) if address is not None}
        self._known: dict[int, tuple[Any, int]] = {}  # of what is made, by identity

    def room(self, tensor: Tensor) -> int:
        """Its number. Raises `KeyError` for a tensor of unknown origin."""
        return self._numbers[tensor.data_ptr()]

    def arguments(self, values: list[Any]) -> tuple[list[Any], list[tuple[int, int]]]:
        """Values with None in the places of objects, and these places with the objects' numbers."""
        places = [(place, number) for place, number in enumerate(map(self._object, values)) if number is not None]
        constants = values.copy()
        for place, _ in places:
            constants[place] = None
        return constants, places

    def _object(self, value: Any) -> int | None:
        """The number of the object that a value is; None for a constant."""
        if type(value) in PLAIN:
            return None
        if isinstance(value, Tensor) and self._keeps_dtype(value):
            return self.room(value)
        if id(value) not in self._known:
            make = self._make(value)
            if make is None:
                return None
            self.made.append(make)
            self._known[id(value)] = value, len(self.tensors) + len(self.made) - 1
        return self._known[id(value)][1]

    def _make(self, value: Any) -> Make | None:
        """How to make a value again; None for a constant."""
        if type(value) in PLAIN:
            return None
        if isinstance(value, Tensor):
            number, dtype = self.room(value), value.dtype
            return itemgetter(number) if self._keeps_dtype(value) else lambda objects: objects[number].view(dtype)
        if isinstance(value, tuple):
            kind, makes = type(value), list(map(self._make, value))
            if not any(makes):
                return None
            if isinstance(value[0], Tensor) and not any(makes[1:]):  # a block
                number, rest = self.room(value[0]), value[1:]
                return lambda objects: tuple.__new__(kind, (objects[number], *rest))
            parts = [(make, None if make else part) for make, part in zip(makes, value, strict=True)]
            return lambda objects: tuple.__new__(kind, [make(objects) if make else part for make, part in parts])
        if hasattr(value, "base"):  # a tensor descriptor
            number, like = self.room(value.base), without_tensor(value)
            return lambda objects: with_tensor(like, objects[number])
        return None

    def _keeps_dtype(self, value: Tensor) -> bool:
        """Whether a tensor is read in the dtype that the input or room has; booleans are read as bytes."""
        tensor = self.tensors[self.room(value)]
        return tensor is not None and tensor.dtype == value.dtype
