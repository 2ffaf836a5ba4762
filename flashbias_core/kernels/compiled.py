"""Kernels that were launched before are launched again without triton's search for them.

Triton makes a key of every single argument at each launch, which takes the host longer than the launch itself.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

from .terms import Block


def launch(
    kernel: Any,
    grid: tuple[int, int],
    arguments: dict[str, Any],
    options: dict[str, Any],
    known: dict[Hashable, CompiledKernel],
    key: Hashable,
) -> None:
    """Launch a kernel; `key` has to say all that its code can depend on, of the arguments and options, in `known`."""
    compiled = known.get(key)
    if compiled is None:
        compiled = kernel[grid](**arguments, **options)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            known[key] = compiled
    else:
        arguments = arguments | options  # the sizes of tiles are arguments too
        programs = (*grid, 1)
        compiled[programs](*[arguments[name] for name in kernel.arg_names])


def kind(argument: Any) -> Hashable:
    """What compiled code can depend on in an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if not isinstance(argument, tuple):
        return argument
    return (kind(argument.ptr), argument.stride) if isinstance(argument, Block) else tuple(map(kind, argument))
