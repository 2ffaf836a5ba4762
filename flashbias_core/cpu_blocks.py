"""Arithmetic on blocks of scores `(..., G, rows, keys)` in fp32 or float64, overwritten wherever that spares a copy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
# The bits of -inf, as an integer.
MINUS_INF = {torch.float32: (torch.int32, -(1 << 23)), torch.float64: (torch.int64, -(1 << 52))}

# Products are summed in pieces of so many terms: BLAS adds one term to the next, and a sum of 131,072 of them would be
# off by 1e-4 where torch's own sums, in pairs, are off by 1e-6.
PIECE = 4096


def hide(scores: Tensor, allowed: Tensor) -> None:
    """-inf in place of what is not allowed, be it NaN."""
    # By their bits: masked_fill_ takes twice to twenty times as long, the longer the less pattern the mask has.
    dtype, minus_inf = MINUS_INF[scores.dtype]
    bits, keep = scores.view(dtype), allowed.to(dtype).neg_()
    bits.bitwise_and_(keep)
    bits.bitwise_or_(keep.bitwise_not_().bitwise_and_(minus_inf))


def exponentiate(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The exponentials in place, relative to each row's largest; that one, 0 where all are -inf, and the row's sum."""
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0.0)
    # torch's exp2 takes a quarter of the time of its exp.
    return top, scores.sub_(top).mul_(LOG2E).exp2_().sum(-1, keepdim=True)


def sum_along(distance: Tensor, weights: Tensor, d_scores: Tensor, d_lse: Tensor | None, spare: Tensor) -> Tensor:
    """The sum of `d_scores * distance` over a block, `(..., G, 1, 1)`. Overwrites the spare block.

    Distances are taken relative to their weighted mean in the row, so that the rounding errors of the row sums of
    `d_scores`, which are those of `d_lse`, are not multiplied by the distance to where the row attends.
    """
    mean = torch.mul(weights, distance, out=spare).sum(-1, keepdim=True)
    total = torch.sub(distance, mean, out=spare).mul_(d_scores).sum((-2, -1), keepdim=True)
    return total if d_lse is None else total + (mean * d_lse).sum(-2, keepdim=True)


def multiply(left: Tensor, right: Tensor, space: Tensor | None = None) -> Tensor:
    """`(..., G, M, K) @ (..., G or 1, K, N)` as `(..., G, M, N)`, in the space where one is given."""
    matrices = right.flatten(0, -3)
    rows = left.reshape(len(matrices), -1, left.shape[-1])
    shape = (*left.shape[:-1], right.shape[-1])
    if space is None:
        return _product(rows, matrices).view(shape)
    out = space[: math.prod(shape)].view(len(matrices), -1, shape[-1])
    return torch.bmm(rows, matrices, out=out).view(shape)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left^T @ right`, of `(..., G, M, K)` and `(..., G, M, N)`, to `(..., G or 1, K, N)`, summed over G there."""
    matrices = total.flatten(0, -3)
    left, right = (tensor.reshape(len(matrices), -1, tensor.shape[-1]) for tensor in (left, right))
    if left.shape[1] > PIECE:
        matrices += _product(left.mT, right)
    else:
        matrices.baddbmm_(left.mT, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`(B, M, K) @ (B, K, N)`, summed in pieces."""
    pieces = left.shape[2] // PIECE
    if pieces < 2:
        return torch.bmm(left, right)
    whole = pieces * PIECE
    left_pieces = left[..., :whole].unflatten(2, (pieces, PIECE)).transpose(1, 2)
    right_pieces = right[:, :whole].unflatten(1, (pieces, PIECE))
    return (left_pieces @ right_pieces).sum(1).baddbmm_(left[..., whole:], right[:, whole:])
