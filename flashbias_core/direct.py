"""Where torch would do no more with a call than make it: then there are shorter ways than through its dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

AUTOCAST = ("cpu", "cuda")  # torch raises for devices that have none, such as meta
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def is_unheard(tensors: Sequence[Any]) -> bool:
    """Whether torch's dispatcher would do nothing but call what is below it; the first of `tensors` is one.

    Compilers, tracers, transforms, modes, profilers, subclasses of tensors and tensors without data listen.
    """
    if torch.compiler.is_compiling():
        return False
    listeners = (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )
    return not listeners and _PLAIN.issuperset(map(type, tensors)) and not tensors[0].is_meta


def has_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what is made of these tensors has a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
