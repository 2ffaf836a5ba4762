"""A pass: what was launched, and asked of torch, for tensors, noted so that it can be done again with others.

Its tensors are known by their places in memory. They become numbers of objects: inputs, rooms, what its steps make.
Compiled kernels are given addresses: each launch would ask a tensor for its own, and the driver what is there. Rooms
that nothing else reads are parts of one piece of memory, since each piece takes the host microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLAIN = {type(None), bool, int, float, str}
ALIGNED = 512  # bytes: so torch aligns what is allocated

Make = Callable[[list[Any]], Any]
Description = tuple[type, dict[str, Any]]


def without_tensor(descriptor: Any) -> Description:
    """The type of a tensor descriptor, and all of it but the tensor, which shall not be kept."""
    return type(descriptor), {name: value for name, value in vars(descriptor).items() if name != "base"}


def with_tensor(description: Description, tensor: Any) -> Any:
    """The tensor descriptor of a tensor that lies like another's, unchecked, or of its `Address`."""
    kind, fields = description
    descriptor: Any = object.__new__(kind)
    vars(descriptor).update(fields, base=tensor)
    return descriptor


class Address(int):
    """Where a tensor begins, in its place in a descriptor, of which a launch asks nothing else."""

    def data_ptr(self) -> int:
        """As of the tensor."""
        return self


def _start(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins, and the size of its elements."""
    return tensor.data_ptr(), tensor.element_size()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _like(room: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    return room if room.shape == shape and room.stride() == stride else room.as_strided(shape, stride)


@dataclass
class Pass:
    """How to make a pass again, from a list of objects that grows: inputs and rooms, addresses of these, addresses of
    rooms that are addresses alone, and what its steps make.

    rooms: shapes, strides, dtypes, and whether they are filled with zeros. shares: where the other rooms begin in one
    piece of memory, and after these its size. steps: what is done with the objects, and whether what comes of it is one
    of them. results: which objects, with shape and strides where these may be others.
    """

    rooms: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]]
    shares: list[int]
    steps: list[tuple[Make, bool]]
    results: list[tuple[int, tuple[torch.Size, tuple[int, ...]] | None]]

    def __call__(self, inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
        first = inputs[0]
        assert first is not None
        objects: list[Any] = [*inputs]
        for shape, stride, dtype, zeros in self.rooms:
            space = first.new_empty_strided(shape, stride, dtype=dtype)  # half of what `new_empty` takes the host
            objects.append(space.zero_() if zeros else space)
        objects += [None if tensor is None else tensor.data_ptr() for tensor in objects]
        *shares, size = self.shares
        if shares:
            memory = first.new_empty_strided((size,), (1,), dtype=torch.uint8)
            start = memory.data_ptr()
            objects += [start + share for share in shares]
        for step, is_kept in self.steps:
            made = step(objects)
            if is_kept:
                objects.append(made)
        return [objects[number] if lie is None else _like(objects[number], *lie) for number, lie in self.results]


class Done(NamedTuple):
    """What was called, and with which arguments: an operation of torch, with the tensor that came of it, or a launch,
    which takes addresses where the kernel is compiled."""

    function: Callable[..., Any]
    arguments: list[Any]
    result: Tensor | None = None
    takes_addresses: bool = False

    def others(self) -> list[tuple[int, Any]]:
        """The arguments that are not `PLAIN`, and their places."""
        return [(place, value) for place, value in enumerate(self.arguments) if type(value) not in PLAIN]


class Making(NamedTuple):
    """What `repeated` was given, and how much was done before by the pass of which this is a part."""

    make: Callable[[], Sequence[Tensor]]
    after: Callable[..., Any] | None
    start: int


class Recorder:
    """Notes rooms, and what is done with them, of the pass that is being made.

    making: the pass, or the part of it that `repeated` was asked for last.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = inputs
        self.rooms: list[tuple[Tensor, bool]] = []
        self.done: list[Done] = []
        self.making: Making | None = None

    def room(self, make: Callable[..., Tensor], arguments: tuple[Any, ...], *, zeros: bool) -> Tensor:
        """As `room_by`."""
        tensor = make(*arguments)
        self.rooms.append((tensor, zeros))
        return tensor

    def do(self, function: Callable[..., Tensor], arguments: tuple[Any, ...], *, is_read: bool = True) -> Tensor:
        """As `done` and `reduced`."""
        result = function(*arguments)
        self.done.append(Done(function, list(arguments), result))
        return result

    def recorded(self, results: Sequence[Tensor]) -> Pass | None:
        """The pass; None where it cannot be made again."""
        if not self.done:
            return None
        others = self._addressed(results)
        rooms = [(room, zeros) for room, zeros in self.rooms if not any(room is other for other in others)]
        writer = _Writer([*self.inputs, *(room for room, _ in rooms)], others)
        try:
            for step in self.done:
                writer.add(step)
            found = [(writer.number(result), self._lie(result)) for result in results]
        except KeyError:
            return None
        sizes = [-(-room.untyped_storage().nbytes() // ALIGNED) * ALIGNED for room in others]
        lies = [(tuple(room.shape), room.stride(), room.dtype, zeros) for room, zeros in rooms]
        return Pass(lies, list(accumulate(sizes, initial=0)), writer.steps, found)

    def _addressed(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The rooms that are nothing but addresses in kernels' arguments."""
        asked = [*results]
        for done in self.done:
            if done.result is not None:
                asked += [value for _, value in done.others() if isinstance(value, Tensor)]
            elif not done.takes_addresses:
                return []
        places = set(map(_start, asked))
        return [room for room, zeros in self.rooms if not zeros and room.numel() > 0 and _start(room) not in places]

    def _lie(self, result: Tensor) -> tuple[torch.Size, tuple[int, ...]] | None:
        """Shape and strides of a result; None for a room as it is."""
        is_room = any(room is result for room, _ in self.rooms)
        return None if is_room else (result.shape, result.stride())


class _Writer:
    """Writes steps, in whose arguments tensors are known by their places."""

    def __init__(self, tensors: list[Tensor | None], others: list[Tensor]) -> None:
        """`others` are known by their addresses alone."""
        self.steps: list[tuple[Make, bool]] = []
        start, end = len(tensors), 2 * len(tensors)
        self._addresses = {number: start + number for number in range(start)}
        self._addresses |= {number: number for number in range(end, end + len(others))}
        self._size = end + len(others)
        self._known: dict[int, tuple[Any, int]] = {}  # objects and their numbers, by identity
        self._tensors: dict[tuple[int, int], tuple[Tensor, int]] = {}  # and tensors by place
        for number, tensor in enumerate(tensors):
            if tensor is not None:
                self._known[id(tensor)] = tensor, number
                if tensor.numel() > 0:  # else it has no place
                    self._tensors.setdefault(_start(tensor), (tensor, number))
        for number, tensor in enumerate(others, end):
            self._tensors[_start(tensor)] = tensor, number

    def number(self, tensor: Tensor) -> int:
        """Of the object in its place. Raises `KeyError` for a tensor of unknown origin."""
        return self._tensors[_start(tensor)][1]

    def add(self, done: Done) -> None:
        """Write the step that does this."""
        run, arguments, result, takes_addresses = done
        constants, places = arguments.copy(), []
        for place, value in done.others():
            number = self._argument(value, takes_addresses) if result is None else self._exactly(value)
            if number is not None:
                constants[place] = None
                places.append((place, number))

        def step(objects: list[Any]) -> Any:
            values = constants.copy()
            for place, number in places:
                values[place] = objects[number]
            return run(*values)

        if result is not None and _start(result) not in self._tensors:
            self._tensors[_start(result)] = result, self._keep(step, result)
        else:
            if result is not None and _start(result) not in map(_start, filter(_is_tensor, arguments)):
                raise KeyError("a part of one tensor that begins where another does, which is chance")
            self.steps.append((step, False))

    def _keep(self, step: Make, made: Any) -> int:
        """Write a step whose result is another object; its number."""
        self._known[id(made)] = made, self._new(step)
        return self._size - 1

    def _new(self, step: Make) -> int:
        self.steps.append((step, True))
        self._size += 1
        return self._size - 1

    def _exactly(self, value: Any) -> int | None:
        """The number of the object that an argument of torch's is, for which more of a tensor counts than where it
        begins; None for a constant."""
        if isinstance(value, Tensor) and id(value) not in self._known:
            find, shape, stride = self._find(value), value.shape, value.stride()
            self._keep(lambda objects: _like(find(objects), shape, stride), value)
        return self._argument(value, False)

    def _argument(self, value: Any, as_address: bool) -> int | None:
        """The number of the object that an argument is; None for a constant."""
        if isinstance(value, Tensor):
            if as_address:
                return self._address(value)
            if id(value) not in self._known and self._has_dtype(value):
                return self.number(value)
        if id(value) in self._known:
            return self._known[id(value)][1]
        make = self._make(value, as_address)
        return None if make is None else self._keep(make, value)

    def _make(self, value: Any, as_address: bool) -> Make | None:
        """How to make a value that is not `PLAIN` again, tensors in it as addresses or not; None for a constant."""
        if isinstance(value, Tensor):
            return itemgetter(self._address(value)) if as_address else self._find(value)
        if isinstance(value, tuple):
            kind = type(value)
            makes = [None if type(part) in PLAIN else self._make(part, as_address) for part in value]
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
        if hasattr(value, "block_shape"):  # a tensor descriptor
            like = without_tensor(value)
            if as_address:
                number = self._address(value.base)
                return lambda objects: with_tensor(like, Address(objects[number]))
            number = self.number(value.base)
            return lambda objects: with_tensor(like, objects[number])
        if isinstance(value, (list, dict)):
            raise TypeError(f"a {type(value).__name__} in a pass, where tensors would not be found")
        return None

    def _address(self, tensor: Tensor) -> int:
        """The number of the address of a tensor, as an object."""
        number = self.number(tensor)
        if number not in self._addresses:
            self._addresses[number] = self._new(lambda objects: objects[number].data_ptr())
        return self._addresses[number]

    def _find(self, value: Tensor) -> Make:
        """How to find the object in a tensor's place, in its dtype."""
        number, dtype = self.number(value), value.dtype
        return itemgetter(number) if self._has_dtype(value) else lambda objects: objects[number].view(dtype)

    def _has_dtype(self, value: Tensor) -> bool:
        """Whether a tensor is read in the dtype of the object; booleans are read as bytes."""
        return self._tensors[_start(value)][0].dtype == value.dtype
