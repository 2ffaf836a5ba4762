"""What both kinds of attention ask of their inputs."""

from typing import Any

from torch import Tensor

from flashbias.integrations import integration


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
    if reason := integration.not_computable(x, head_dim):
        return reason
    if attention._forward_hooks or attention._forward_pre_hooks:
        return "a hook on the attention module inside, which is never called,"
    return None
