"""The state of the GPU, all of which is nothing on a CPU."""

from __future__ import annotations

import gc

import torch


def choose(device: str) -> None:
    """Make it the current one."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)


def start_triton(device: str) -> None:
    """Have triton build what it needs once on a machine, whatever it compiles later."""
    if device.startswith("cuda"):
        import triton

        triton.runtime.driver.active.get_current_device()


def synchronize(device: str) -> None:
    """Wait until all is computed."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def alive(device: str) -> bool:
    """Whether the device still answers this process; after an illegal memory access it does not."""
    try:
        synchronize(device)
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False


def forget(device: str) -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
