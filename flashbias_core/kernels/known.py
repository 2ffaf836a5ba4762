"""Launches of kernels whose arguments are tensors and numbers: known ones go past triton's search."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from .compiled import Known, kinds, launch

_COMPILED: dict[Hashable, Known] = {}  # does not grow with the number of lengths


def launch_known(
    kernel: Any, grid: tuple[int, int], device: torch.device, arguments: dict[str, Any], **constants: Any
) -> None:
    """Launch a kernel of a pass with arguments, and constants that its code depends on by their values."""
    key = (id(kernel), device, *kinds(kernel, arguments), *constants.values())
    launch(kernel, grid, arguments, lambda: constants, _COMPILED, key)
