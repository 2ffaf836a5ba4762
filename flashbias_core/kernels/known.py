"""Launches of kernels whose arguments are tensors and numbers: known ones go past triton's search."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .compiled import Known, kind, launch

_COMPILED: dict[Hashable, Known] = {}  # does not grow with the number of lengths
_kinds = lru_cache(maxsize=2048)(kind)


def launch_known(
    kernel: Any,
    grid: tuple[int, int],
    device: torch.device,
    tensors: Mapping[str, Tensor | None],
    numbers: Mapping[str, int | float],
    **constants: Any,
) -> None:
    """Launch a kernel on a device, with constants that its code depends on by their values."""
    key = (id(kernel), device, _kinds(tuple(numbers.values())), *map(kind, tensors.values()), *constants.values())
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        launch(kernel, grid, {**tensors, **numbers}, lambda: constants, _COMPILED, key)
