"""The state of the GPU, all of which is nothing on a CPU."""

from __future__ import annotations

import gc
import importlib

import torch

from flashbias import plan


def choose(device: str) -> None:
    """Make it the current one."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)


def start(device: str) -> None:
    """Do what a process has to do once, whatever it calls: triton builds its helpers, and modules are imported.

    torch imports more than a second's worth where gradients of a call are first asked for.
    """
    if device.startswith("cuda"):
        import triton

        triton.runtime.driver.active.get_current_device()
        importlib.import_module("flashbias.kernels.launch")
        if plan.has_teams(torch.device(device)):
            importlib.import_module("flashbias.kernels.hopper")
    one = torch.ones(1, device=device, requires_grad=True)
    torch.autograd.grad(one + one, one, torch.ones_like(one))


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
