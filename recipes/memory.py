"""Peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(work: Callable[[], T], device: str) -> tuple[T, int]:
    """The result of `work()`, and the bytes by which memory rose above where it was before, at its highest.

    On a GPU: memory that torch had allocated there. On the CPU: resident memory of the process; measure in a fresh one,
    because what an earlier computation has freed may be resident already.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with _freed_memory_goes_back():
        before = _resident()
        result = work()
        return result, max(0, _resident_peak() - before)


def held_memory(device: str) -> int:
    """Bytes held now: on a GPU those that torch has allocated there, on the CPU those of the process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated(device)
    return _field("VmRSS") if _STATUS.exists() else _resident_peak()


@contextlib.contextmanager
def _freed_memory_goes_back() -> Iterator[None]:
    """Have glibc return every freed tensor to the system at once.

    It keeps blocks below 32 MiB for later otherwise, and the peak depends on how well they happen to fit together.
    Afterwards it is as it would have become by itself from working with tensors of that size.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    trim_threshold, mmap_threshold = -1, -3
    if mallopt is not None:
        libc.malloc_trim(0)  # what was freed before would serve the work without a rise
        mallopt(mmap_threshold, 64 * 2**10)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(mmap_threshold, 32 * 2**20)
            mallopt(trim_threshold, 64 * 2**20)


def _resident() -> int:
    """Resident bytes now. Linux can forget its record of the highest; elsewhere the highest so far has to serve."""
    try:
        _CLEAR.write_text("5")
        return _field("VmRSS")
    except OSError:
        return _resident_peak()


def _resident_peak() -> int:
    if _STATUS.exists():
        return _field("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _field(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")
