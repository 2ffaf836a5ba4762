"""What stands in for compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_char
from math import prod
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from flashbias.kernels.passes import with_tensor, without_tensor


class StandIn(CompiledKernel):
    """A kernel without code: launched as it is, or straight, `self[grid]` is called with the kernel's arguments."""

    function = packed_metadata = None

    def __init__(self) -> None:
        self.module = None

    def _init_handles(self) -> None:
        """Is not loaded, which triton 3.3 would do when asked for `run`."""

    @property
    def run(self) -> Callable[..., Any]:
        # Between the grid and the kernel's arguments: a stream, the two above, and three of hooks.
        return lambda *given: self[given[:3]](*given[9:])


def tensor_at(given: Tensor | int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel is given: a tensor, or the address of a contiguous one on the CPU."""
    if isinstance(given, Tensor):
        return given
    memory = (c_char * (prod(shape) * dtype.itemsize)).from_address(given)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def with_tensors(given: Any, like: Any) -> Any:
    """A kernel's argument with tensors for addresses, which lie as those of another launch do."""
    if isinstance(like, Tensor) and isinstance(given, int):
        size = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        return tensor_at(given, (size,), like.dtype).as_strided(like.shape, like.stride())
    if isinstance(like, tuple):
        return tuple.__new__(type(like), map(with_tensors, given, like))
    if hasattr(like, "base"):  # a tensor descriptor
        return with_tensor(without_tensor(like), with_tensors(given.base, like.base))
    return given
