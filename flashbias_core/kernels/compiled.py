"""Kernels that were launched before are launched again without triton's search for them.

Triton makes a key of every single argument at each launch, which takes the host longer than the launch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

try:
    from triton.knobs import runtime as hooks
except ImportError:  # triton 3.3 has them elsewhere
    hooks = None

from . import ahead, replay
from .terms import Block

OPTIONS = {"enable_fp_fusion": True}  # of every launch; said outright, since triton's default is to change
# A kernel, the values of its arguments, and the places and names of those that are each launch's own.
Known = tuple[CompiledKernel, list[Any], list[tuple[int, str]]]


def launch(
    kernel: Any,
    grid: tuple[int, int],
    arguments: dict[str, Any],
    constants: Callable[[], dict[str, Any]],
    known: dict[Hashable, Known],
    key: Hashable,
) -> None:
    """Launch a kernel with `arguments` and what `constants()` gives, the launch's options among it.

    `key` has to say in `known` all that the constants are, and all of the arguments that compiled code can depend on.
    """
    if ahead.is_surveying():
        if key not in known:
            fixed = constants() | OPTIONS
            keep = partial(_keep, known, key, kernel, list(arguments), fixed)
            ahead.survey((id(known), key), kernel, arguments | fixed, keep)
        return
    if key not in known:
        ahead.compile_missing()
    programs = (*grid, 1)
    if key in known:
        compiled, constant, places = known[key]
        run = launcher(compiled, programs)
        values = _filled(constant, places, arguments)
        run(*values)
    else:
        fixed = constants() | OPTIONS
        compiled = kernel[grid](**arguments, **fixed)
        if isinstance(compiled, CompiledKernel):
            _, constant, places = _keep(known, key, kernel, list(arguments), fixed, compiled)
            values = _filled(constant, places, arguments)
            run = launcher(compiled, programs)
        else:  # the interpreter compiles nothing
            values = [(arguments | fixed).get(name) for name in kernel.arg_names]
            run = partial(_interpret, kernel[grid], kernel.arg_names)
    replay.note(run, values, takes_addresses=isinstance(compiled, CompiledKernel))


def launcher(compiled: CompiledKernel, programs: tuple[int, int, int]) -> Callable[..., Any]:
    """What launches a kernel in so many programs on the current device: as triton does, but straight while nobody
    listens. Triton describes each launch for hooks, which profilers hang in, and asks for the device each time."""
    told = compiled[programs]
    if hooks is None or not has_gpu():
        return told
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of, device = driver.active.get_current_stream, torch.cuda.current_device()

    def launch(*values: Any) -> None:
        if _listeners(hooks.launch_enter_hook) or _listeners(hooks.launch_exit_hook):
            told(*values)
        else:
            run(*programs, stream_of(device), function, metadata, None, None, None, *values)

    return launch


@cache
def has_gpu() -> bool:
    """Whether kernels can be launched at all: those of tests are compiled on machines without a GPU too."""
    return torch.cuda.is_available()


def _listeners(hook: Any) -> Any:
    """What hangs in a hook of triton's: a chain, or, if somebody has put it there, one function."""
    return getattr(hook, "calls", hook)


def _keep(
    known: dict[Hashable, Known], key: Hashable, kernel: Any, arguments: list[str], constants: dict[str, Any],
    compiled: CompiledKernel,
) -> Known:  # fmt: skip
    """Keep a kernel that was compiled for arguments of these names; the sizes of tiles are constants of it."""
    places = [(place, name) for place, name in enumerate(kernel.arg_names) if name in arguments]
    known[key] = made = compiled, [constants.get(name) for name in kernel.arg_names], places
    return made


def _filled(constant: list[Any], places: list[tuple[int, str]], arguments: dict[str, Any]) -> list[Any]:
    values = constant.copy()
    for place, name in places:
        values[place] = arguments[name]
    return values


def _interpret(kernel: Any, names: list[str], *values: Any) -> None:
    kernel(**dict(zip(names, values, strict=True)))


def kinds(kernel: Any, arguments: dict[str, Any]) -> tuple[Hashable, ...]:
    """What a kernel's compiled code can depend on in arguments; those in capitals are constants of it."""
    sizes = _sizes(kernel)
    found = [
        value if name.isupper() else size_kind(value) if name in sizes else kind(value)
        for name, value in arguments.items()
    ]
    return tuple(found)


@cache
def _sizes(kernel: Any) -> frozenset[str]:
    """The names of a kernel's numbers for which it is not specialized; where it is interpreted, none are known."""
    return frozenset(parameter.name for parameter in getattr(kernel, "params", ()) if parameter.do_not_specialize)


def size_kind(size: int | float) -> Hashable:
    """What compiled code can depend on in a number for which it is not specialized."""
    return -(2**31) <= size < 2**31 if type(size) is int else "float"


def kind(argument: Any) -> Hashable:
    """What compiled code can depend on in an argument: of a number no more than triton's specializations."""
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if argument is None or isinstance(argument, bool):
        return argument
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, Block):
        return kind(argument.ptr), *map(kind, argument.stride)
    if isinstance(argument, tuple):
        return tuple(map(kind, argument))
    return "float" if isinstance(argument, float) else argument
