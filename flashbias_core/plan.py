"""Which code serves a call, and in which tiles. Every decision of that kind is made here, by pure functions."""

from __future__ import annotations

import os
from functools import cache

import torch

from .errors import DeviceError, UnsupportedError

BACKENDS = ("auto", "cpu", "triton")


def backend(device: torch.device) -> str:
    """`"triton"` or `"cpu"`, from the device and the environment variable `FLASHBIAS_BACKEND`.

    Raises:
        UnsupportedError: for another value of the variable.
        DeviceError: where the backend does not serve the device, or triton is missing.
    """
    wanted = os.environ.get("FLASHBIAS_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise UnsupportedError(f"FLASHBIAS_BACKEND={wanted}", "one of " + ", ".join(BACKENDS), "unset it")
    chosen = ("cpu" if device.type == "cpu" else "triton") if wanted == "auto" else wanted
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type not in ("cpu", "cuda") or ((chosen == "cpu") != (device.type == "cpu") and not interpreted):
        raise DeviceError(
            f"tensors on {device.type} for the backend {chosen}",
            "cpu tensors for the backend cpu, cuda tensors for triton (cpu tensors with TRITON_INTERPRET=1)",
            "move the tensors, or unset FLASHBIAS_BACKEND",
        )
    if chosen == "triton" and not _has_triton():
        raise DeviceError("CUDA tensors, but triton cannot be imported", "triton >= 3.3", "pip install triton")
    return chosen


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401 - whether it imports is the question
    except ImportError:
        return False
    return True
