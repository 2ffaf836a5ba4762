"""Passes of kernels whose arguments are tensors and numbers: known ones go past triton's search, and past ours."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .compiled import Known, kinds, launch
from .replay import repeated

_COMPILED: dict[Hashable, Known] = {}  # does not grow with the number of lengths


def passed(
    name: str, settings: tuple[Hashable, ...], inputs: Sequence[Tensor | None], make: Callable[[], Sequence[Tensor]]
) -> Sequence[Tensor]:
    """What `make()` gives by launches from the inputs, the first of them not None, and the settings alone."""
    first = inputs[0]
    assert first is not None
    device = first.device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        return repeated((name, device, *settings), inputs, make)


def launch_known(
    kernel: Any, grid: tuple[int, int], device: torch.device, arguments: dict[str, Any], **constants: Any
) -> None:
    """Launch a kernel of a pass with arguments, and constants that its code depends on by their values."""
    key = (id(kernel), device, *kinds(arguments), *constants.values())
    launch(kernel, grid, arguments, lambda: constants, _COMPILED, key)
