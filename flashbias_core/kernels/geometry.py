"""How tensors lie in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """All of a tensor that the way to launch a kernel can depend on; `place` is its address modulo 16 bytes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    place: int


def geometry(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor lies in memory: the fields of a `Geometry`, since to make one takes longer than to find them."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16
