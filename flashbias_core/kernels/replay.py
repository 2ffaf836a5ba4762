"""Passes like one that was made before are made again: the same launches, past all that finds and describes them.

A pass makes tensors from tensors. Its kernels write into `room`s, and what it asks torch for is `done` by functions of
tensors; then all but the tensors themselves is the same whenever inputs lie in memory alike. A pass in which a launch
takes, or which gives, a tensor of another origin is made in the long way each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .passes import Done, Making, Pass, Recorder
from .setting import Setting

PASSES = 2048  # at most, each of a few kilobytes
HERE = nullcontext()
FILLS = "fill_uninitialized_memory"
_passes: dict[Hashable, Pass | None] = {}
_thread = threading.local()
# Whether torch fills new memory under its deterministic switch, which costs up to half of a backward pass. Kernels fill
# all of what they are given.
_filling = Setting(
    partial(getattr, torch.utils.deterministic, FILLS), partial(setattr, torch.utils.deterministic, FILLS), False
)


def repeated(
    key: Hashable,
    inputs: Sequence[Tensor | None],
    make: Callable[[], Sequence[Tensor]],
    after: Callable[..., Any] | None = None,
) -> Sequence[Tensor]:
    """What `make()` gives, which makes it of `inputs` on the device of the first, which is not None.

    `key` has to say all that this depends on beside the inputs and how they lie. `after(*results)` would make the pass
    that follows, if one will: it is called only to find its kernels (`ahead.py`).
    """
    outer = recorder()
    if outer is not None:
        outer.making = Making(make, after, len(outer.done))
        return make()  # as a part of the pass that is being made
    key = _key(key, inputs)
    known = _passes.get(key)
    if known is not None:
        return _again(known, inputs)
    with _place(inputs):
        if key in _passes:
            return make()
        new = Recorder(inputs)
        new.making = Making(make, after, 0)
        with noted_by(new):
            results = make()
        if len(_passes) >= PASSES:
            _passes.clear()
        _passes[key] = new.recorded(results)
        return results


def known_pass(key: Hashable, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]] | None:
    """How `repeated` makes a pass again, from inputs that lie as these do, each at a place of its own; None if it does
    not."""
    whole = _key(key, inputs)
    known = _passes.get(whole)
    apart = all(lie is None or lie[-1] == number for number, lie in enumerate(whole[2:]))
    return partial(_again, known) if known is not None and apart else None


def _again(known: Pass, inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
    place = _place(inputs)
    if place is HERE:
        return known(inputs)
    with place:
        return known(inputs)


def _key(key: Hashable, inputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
    assert inputs[0] is not None
    return key, inputs[0].device, *_lies(inputs)


def _lies(inputs: Sequence[Tensor | None]) -> list[tuple[Any, ...] | None]:
    """How inputs lie in memory, and the number of the first that begins where each does.

    Not by `geometry`, which would ask each for its address once more: every call waits for this.
    """
    lies: list[tuple[Any, ...] | None] = []
    firsts: dict[int, int] = {}
    for number, tensor in enumerate(inputs):
        if tensor is None:
            lies.append(None)
        else:
            place = tensor.data_ptr()
            first = firsts.setdefault(place, number)
            lies.append((tensor.shape, tensor.stride(), tensor.dtype, place % 16, first))
    return lies


def _place(inputs: Sequence[Tensor | None]) -> AbstractContextManager[Any]:
    """Where a pass is made: the device of the first input, in memory as it is."""
    assert inputs[0] is not None
    place = on(inputs[0].device)
    return _unfilled(place) if torch.are_deterministic_algorithms_enabled() else place


@contextmanager
def _unfilled(place: AbstractContextManager[Any]) -> Iterator[None]:
    with _filling.held(), place:
        yield


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A device as the current one."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else HERE


def recorder() -> Recorder | None:
    """That of the pass which this thread makes for the first time."""
    return getattr(_thread, "recorder", None)


@contextmanager
def noted_by(new: Recorder) -> Iterator[None]:
    """What this thread makes is noted by another recorder."""
    before, _thread.recorder = recorder(), new
    try:
        yield
    finally:
        _thread.recorder = before


def room(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, *, zeros: bool = False) -> Tensor:
    """Memory beside `like`, in its dtype or another, that kernels fill; some only in part, and need zeros."""
    make = Tensor.new_zeros if zeros else Tensor.new_empty
    return room_by(partial(make, dtype=dtype), like, shape, zeros=zeros)


def room_by(make: Callable[..., Tensor], *arguments: Any, zeros: bool = False) -> Tensor:
    """New memory that `make(*arguments)` gives, of any strides, as a `room`."""
    noting = recorder()
    return make(*arguments) if noting is None else noting.room(make, arguments, zeros=zeros)


def done(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, which is made of its arguments alone; a list of tensors is none."""
    noting = recorder()
    return function(*arguments) if noting is None else noting.do(function, arguments)


def reduced(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """As `done`, of a tensor before all, for what no kernel reads: only results are made of it."""
    noting = recorder()
    return function(*arguments) if noting is None else noting.do(function, arguments, is_read=False)


def note(run: Callable[..., Any], arguments: list[Any], *, takes_addresses: bool) -> None:
    """Note a launch, `run(*arguments)`, of the pass that is being made, if one is; with addresses next time or not."""
    noting = recorder()
    if noting is not None:
        noting.done.append(Done(run, arguments, takes_addresses=takes_addresses))


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is not contiguous."""
    return tensor if tensor.is_contiguous() else done(Tensor.contiguous, tensor)


def forget() -> None:
    """Make all passes in the long way once more."""
    _passes.clear()
