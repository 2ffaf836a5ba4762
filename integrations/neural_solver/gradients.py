"""Attention in half precision whose gradients keep theirs.

A loss that is a mean over N points has gradients of about 1 / N, which half precision (smallest number 2^-24) rounds to
nothing. The way back is linear in the gradient of the output: that is multiplied by a power of two, computed from it
on the device, and the gradients of the inputs are divided by it, in fp32. The factor travels as the gradient of a
token, so that compilers and checkpoints see nothing but functions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HEADROOM = 2.0**15  # the gradient of a value sums over all queries, and the largest number is just below 2^16


def in_half(attend: Callable[..., Tensor], tensors: Sequence[Tensor], scale: float) -> Tensor:
    """`attend(query, key, value, *factors, scale)` with the first three in fp16, the output in fp32."""
    query, key, value, *factors = tensors
    # Others must not pass: all that comes out of an autograd function requires a gradient, and would be given one.
    live = [factor for factor in factors if factor.requires_grad]
    query, key, value, *live, token = _Lower.apply(query, key, value, *live)
    passed = iter(live)
    factors = [next(passed) if factor.requires_grad else factor for factor in factors]
    return _Raise.apply(attend(query, key, value, *factors, scale), token)


def lowered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that dtype, head by head in memory: nothing is copied for that where the dtype changes anyway."""
    return tensor.to(dtype, memory_format=torch.contiguous_format)


class _Lower(torch.autograd.Function):
    """Query, key and value in half precision, factors as they are, and a token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        # Not a number, which would not promote a half that is divided by it.
        token = query.new_zeros((1,) * query.dim(), dtype=torch.float32)
        halves = (lowered(query, torch.float16), lowered(key, torch.float16), lowered(value, torch.float16))
        return *halves, *(factor.view_as(factor) for factor in factors), token

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *scaled, factor = gradients
        wanted = ctx.needs_input_grad
        return tuple(g / factor if want else None for g, want in zip(scaled, wanted, strict=True))


class _Raise(torch.autograd.Function):
    """The output `(B, H, N, C)` in fp32; on the way back scaled for half precision, the token told by how much."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, token: Tensor) -> Tensor:
        return out.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        room = 2.0 ** math.floor(math.log2(HEADROOM / max(1, gradient.shape[-2])))
        every = tuple(range(gradient.dim()))
        largest = torch.linalg.vector_norm(gradient, torch.inf, every, keepdim=True).clamp(min=1e-30)  # without a copy
        mantissa, _ = torch.frexp(largest)
        factor = room * mantissa / largest  # a power of two, by which largest becomes half of room or more
        return (gradient * factor).half(), factor
