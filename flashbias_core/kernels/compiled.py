"""Kernels that were launched before are launched again without triton's search for them.

Triton makes a key of every single argument at each launch, which takes the host longer than the launch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

from . import ahead, replay
from .terms import Block

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
    if ahead.is_surveyed(kernel, grid, arguments, constants, known, key):
        return
    programs = (*grid, 1)
    if key in known:
        compiled, constant, places = known[key]
        run = compiled[programs]
        values = _filled(constant, places, arguments)
        run(*values)
    else:
        ahead.compile_missing()
        fixed = constants()
        compiled = kernel[grid](**arguments, **fixed)
        names = kernel.arg_names  # the sizes of tiles are arguments too
        places = [(place, name) for place, name in enumerate(names) if name in arguments]
        constant = [fixed.get(name) for name in names]
        values = _filled(constant, places, arguments)
        if isinstance(compiled, CompiledKernel):
            known[key] = compiled, constant, places
            run = compiled[programs]
        else:  # the interpreter compiles nothing
            run = partial(_interpret, kernel[grid], names)
    replay.note(run, values)


def _filled(constant: list[Any], places: list[tuple[int, str]], arguments: dict[str, Any]) -> list[Any]:
    values = constant.copy()
    for place, name in places:
        values[place] = arguments[name]
    return values


def _interpret(kernel: Any, names: list[str], *values: Any) -> None:
    kernel(**dict(zip(names, values, strict=True)))


def kinds(arguments: dict[str, Any]) -> tuple[Hashable, ...]:
    """What compiled code can depend on in arguments; those in capitals are constants of it."""
    return tuple(value if name.isupper() else kind(value) for name, value in arguments.items())


def kind(argument: Any) -> Hashable:
    """What compiled code can depend on in an argument: of a number no more than triton's specializations."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, Block):
        return kind(argument.ptr), *map(kind, argument.stride)
    if isinstance(argument, tuple):
        return tuple(map(kind, argument))
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return "float" if isinstance(argument, float) else argument
