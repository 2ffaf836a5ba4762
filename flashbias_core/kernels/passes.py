"""A pass: what was launched, and asked of torch, for tensors, noted so that it can be done again with others.

Its tensors are known by their places in memory. They become numbers of objects: inputs, rooms, what its steps make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLAIN = {type(None), bool, int, float, str}

Make = Callable[[list[Any]], Any]
Description = tuple[type, dict[str, Any]]


def without_tensor(descriptor: Any) -> Description:
    """The type of a tensor descriptor, and all of it but the tensor, which shall not be kept."""
    return type(descriptor), {name: value for name, value in vars(descriptor).items() if name != "base"}


def with_tensor(description: Description, tensor: Tensor) -> Any:
    """The tensor descriptor of a tensor that lies like another's, unchecked."""
    kind, fields = description
    descriptor: Any = object.__new__(kind)
    vars(descriptor).update(fields, base=tensor)
    return descriptor


def _start(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins, and the size of its elements."""
    return tensor.data_ptr(), tensor.element_size()


def _like(room: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    return room if room.shape == shape and room.stride() == stride else room.as_strided(shape, stride)


@dataclass
class Pass:
    """How to make a pass again, from a list of objects that grows: inputs, rooms, and what its steps make.

    rooms: shapes, strides, dtypes, and whether they are filled with zeros. steps: what is done with the objects, and
    whether what comes of it is one of them. results: which objects, with shape and strides where these may be others.
    """

    rooms: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]]
    steps: list[tuple[Make, bool]]
    results: list[tuple[int, tuple[torch.Size, tuple[int, ...]] | None]]

    def __call__(self, inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
        first = inputs[0]
        assert first is not None
        objects: list[Any] = [*inputs]
        for shape, stride, dtype, zeros in self.rooms:
            space = first.new_empty_strided(shape, stride, dtype=dtype)  # half of what `new_empty` takes the host
            objects.append(space.zero_() if zeros else space)
        for step, is_kept in self.steps:
            made = step(objects)
            if is_kept:
                objects.append(made)
        return [objects[number] if lie is None else _like(objects[number], *lie) for number, lie in self.results]


class Making(NamedTuple):
    """What `repeated` was given, and how much was done before by the pass of which this is a part."""

    make: Callable[[], Sequence[Tensor]]
    after: Callable[..., Any] | None
    start: int


class Recorder:
    """Notes rooms, and what is done with them, of the pass that is being made.

    done: what was called, with which arguments, and the tensor that came of it, or None after a launch. making: the
    pass, or the part of it that `repeated` was asked for last.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = inputs
        self.rooms: list[tuple[Tensor, bool]] = []
        self.done: list[tuple[Callable[..., Any], list[Any], Tensor | None]] = []
        self.making: Making | None = None

    def room(self, make: Callable[..., Tensor], arguments: tuple[Any, ...], *, zeros: bool) -> Tensor:
        """As `room_by`."""
        tensor = make(*arguments)
        self.rooms.append((tensor, zeros))
        return tensor

    def do(self, function: Callable[..., Tensor], arguments: tuple[Any, ...], *, is_read: bool = True) -> Tensor:
        """As `done` and `reduced`."""
        result = function(*arguments)
        self.done.append((function, list(arguments), result))
        return result

    def recorded(self, results: Sequence[Tensor]) -> Pass | None:
        """The pass; None where it cannot be made again."""
        if not self.done:
            return None
        writer = _Writer([*self.inputs, *(room for room, _ in self.rooms)])
        try:
            for run, arguments, result in self.done:
                writer.add(run, arguments, result)
            found = [(writer.number(result), self._lie(result)) for result in results]
        except KeyError:
            return None
        rooms = [(tuple(room.shape), room.stride(), room.dtype, zeros) for room, zeros in self.rooms]
        return Pass(rooms, writer.steps, found)

    def _lie(self, result: Tensor) -> tuple[torch.Size, tuple[int, ...]] | None:
        """Shape and strides of a result; None for a room as it is."""
        is_room = any(room is result for room, _ in self.rooms)
        return None if is_room else (result.shape, result.stride())


class _Writer:
    """Writes steps, in whose arguments tensors are known by their places."""

    def __init__(self, tensors: list[Tensor | None]) -> None:
        self.steps: list[tuple[Make, bool]] = []
        self._size = len(tensors)
        self._known: dict[int, tuple[Any, int]] = {}  # objects and their numbers, by identity
        self._tensors: dict[tuple[int, int], tuple[Tensor, int]] = {}  # and tensors by place
        for number, tensor in enumerate(tensors):
            if tensor is not None:
                self._known[id(tensor)] = tensor, number
                if tensor.numel() > 0:  # else it has no place
                    self._tensors.setdefault(_start(tensor), (tensor, number))

    def number(self, tensor: Tensor) -> int:
        """Of the object in its place. Raises `KeyError` for a tensor of unknown origin."""
        return self._tensors[_start(tensor)][1]

    def add(self, run: Callable[..., Any], arguments: list[Any], result: Tensor | None) -> None:
        """Write the step that runs this."""
        find = self._object if result is None else self._exactly
        places = [(place, number) for place, number in enumerate(map(find, arguments)) if number is not None]
        constants = arguments.copy()
        for place, _ in places:
            constants[place] = None

        def step(objects: list[Any]) -> Any:
            values = constants.copy()
            for place, number in places:
                values[place] = objects[number]
            return run(*values)

        if result is not None and _start(result) not in self._tensors:
            self._tensors[_start(result)] = result, self._keep(step, result)
        else:
            self.steps.append((step, False))

    def _keep(self, step: Make, made: Any) -> int:
        """Write a step whose result is another object; its number."""
        self.steps.append((step, True))
        self._known[id(made)] = made, self._size
        self._size += 1
        return self._size - 1

    def _exactly(self, value: Any) -> int | None:
        """As `_object`, but for an operation of torch, which looks at more of a tensor than its address."""
        if isinstance(value, Tensor) and id(value) not in self._known:
            find, shape, stride = self._find(value), value.shape, value.stride()
            self._keep(lambda objects: _like(find(objects), shape, stride), value)
        return self._object(value)

    def _object(self, value: Any) -> int | None:
        """The number of the object that a value is; None for a constant."""
        if type(value) in PLAIN:
            return None
        if id(value) in self._known:
            return self._known[id(value)][1]
        if isinstance(value, Tensor) and self._has_dtype(value):
            return self.number(value)
        make = self._make(value)
        return None if make is None else self._keep(make, value)

    def _make(self, value: Any) -> Make | None:
        """How to make a value again; None for a constant."""
        if type(value) in PLAIN:
            return None
        if isinstance(value, Tensor):
            return self._find(value)
        if isinstance(value, tuple):
            kind, makes = type(value), list(map(self._make, value))
            if not any(makes):
                return None
            first, rest = makes[0], value[1:]
            if first and not any(makes[1:]):  # a block
                return lambda objects: tuple.__new__(kind, (first(objects), *rest))
            places = [(place, make) for place, make in enumerate(makes) if make]
            parts = [None if make else part for make, part in zip(makes, value, strict=True)]

            def filled(objects: list[Any]) -> Any:
                values = parts.copy()
                for place, make in places:
                    values[place] = make(objects)
                return tuple.__new__(kind, values)

            return filled
        if hasattr(value, "base"):  # a tensor descriptor
            number, like = self.number(value.base), without_tensor(value)
            return lambda objects: with_tensor(like, objects[number])
        if isinstance(value, (list, dict)):
            raise TypeError(f"a {type(value).__name__} in a pass, where tensors would not be found")
        return None

    def _find(self, value: Tensor) -> Make:
        """How to find the object in a tensor's place, in its dtype."""
        number, dtype = self.number(value), value.dtype
        return itemgetter(number) if self._has_dtype(value) else lambda objects: objects[number].view(dtype)

    def _has_dtype(self, value: Tensor) -> bool:
        """Whether a tensor is read in the dtype of the object; booleans are read as bytes."""
        return self._tensors[_start(value)][0].dtype == value.dtype
