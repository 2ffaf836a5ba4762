"""What both kinds of attention ask of their inputs."""

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def with_aligned_rows(bias: Tensor) -> Tensor:
    """The bias `(..., N, N)` laid out row by row, each row starting at a multiple of 16 bytes, as wide loads want."""
    n = bias.shape[-1]
    if bias.is_contiguous() and n % 8 == 0:
        return bias
    wide = bias.new_empty((*bias.shape[:-1], n + -n % 8))
    wide[..., :n] = bias
    return wide[..., :n]


def not_computable(x: Tensor, attention: Any, head_dim: int) -> str | None:
    """Why the operator cannot take the place of the host's module `attention` for an input x, or None."""
    device = x.device.type
    if device not in ("cpu", "cuda"):
        return f"a tensor on {device}"
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if dtype not in DTYPES:
        return f"{dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim}"
    if attention._forward_hooks or attention._forward_pre_hooks:
        return "a hook on the attention module inside, which is never called,"
    return None
