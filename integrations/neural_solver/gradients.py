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


def by_position(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor `(B, H, N, C)` in that dtype, position by position in memory, as linear layers have it."""
    return tensor.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _in_one(operation: Callable[..., Tensor], tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`operation(tensor, factor)` in that dtype, position by position in memory, in one launch."""
    tensor = tensor.transpose(1, 2)
    if torch.is_grad_enabled():  # compilers, and second derivatives, which are the operator's to refuse
        return operation(tensor, factor).to(dtype).transpose(1, 2)
    out = tensor.new_empty(tensor.shape, dtype=dtype)
    return operation(tensor, factor, out=out).transpose(1, 2)


class _Lower(torch.autograd.Function):
    """Query, key and value in half precision, factors as they are, and a token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        # Nobody reads it. Of no dimension, its gradient would not promote a half.
        token = query.new_empty((1,) * query.dim(), dtype=torch.float32)
        halves = (lowered(query, torch.float16), lowered(key, torch.float16), lowered(value, torch.float16))
        return *halves, *(factor.view_as(factor) for factor in factors), token

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *scaled, factor = gradients
        return tuple(
            (g / factor if g.dtype == torch.float32 else _in_one(torch.div, g, factor, torch.float32)) if want else None
            for g, want in zip(scaled, ctx.needs_input_grad, strict=True)
        )


class _Raise(torch.autograd.Function):
    """The output `(B, H, N, C)` in fp32; on the way back scaled for half precision, the token told by how much."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, token: Tensor) -> Tensor:
        return by_position(out, torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        room = 2.0 ** math.floor(math.log2(HEADROOM / max(1, gradient.shape[-2])))
        every = tuple(range(gradient.dim()))
        largest = torch.linalg.vector_norm(gradient, torch.inf, every, keepdim=True).clamp(min=1e-30)  # without a copy
        mantissa, _ = torch.frexp(largest)
        factor = room * mantissa / largest  # a power of two, by which largest becomes half of room or more
        return _in_one(torch.mul, gradient, factor, torch.float16), factor
