"""Attention on the CPU: blocks of queries against all their keys, in fp32, recomputed on the way back.

Every tensor is viewed as `(*batch, Hkv, G, ...)` with G the query heads that share a key head, each dimension its own
size or 1. The matrices of a part of (*batch, Hkv) are worked on together, some rows at a time, so that a block of scores
stays in the cache. Factors stand beside query and key, and one product gives both scores and bias. Scores are in units
of log(2): torch's exp2 takes a quarter of the time of its exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .operands import Operands

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# Scores in a block, for each thread, and the rows of a matrix in it where there are that many.
BLOCK = 1 << 19
ROWS = 64

# Dimensions of the operands behind those of batch and heads, or behind those of the batch.
_OF_HEADS = {"q_factor": 2, "k_factor": 2, "slopes": 0, "values": 2, "allowed": 2}
_OF_BATCH = {"q_positions": 1, "k_positions": 1, "offsets": 0, "lengths": 0, "q_ids": 1, "k_ids": 1}


def forward(query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float) -> tuple[Tensor, Tensor]:
    """Output `(*batch, H, Nq, Cv)` in the dtype of query, and LSE `(*batch, H, Nq)` in fp32."""
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    heads = _Heads(query, key)
    results = {"out": heads.view(out, 2), "lse": heads.view(lse, 1)}
    for chunk, part in _parts(heads, query, key, value, operands, scale):
        out_part, lse_part = (_narrow(result, chunk) for result in results.values())
        for rows, n in part.blocks():
            weights = part.scores(rows, n, part.distance(rows, n))
            top, total = _exponentiate(weights)
            # A row that attends somewhere has a total of 1 at least.
            product = torch.bmm(part.fold(weights, part.value), part.value[:, :n]).view(*weights.shape[:-1], -1)
            out_part[..., rows, :] = product.div_(total.clamp(min=1.0))
            lse_part[..., rows] = total.log2_().add_(top).mul_(LN2).squeeze(-1)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Operands,
    scale: float,
    names: set[str],
) -> dict[str, Tensor]:
    """Gradients in fp32 of the inputs with these names, in their shapes.

    The weights are normalised anew from the recomputed scores, not from `lse`, and the row sums of `P dP` are taken
    before any rounding, not from `out`: rounding errors of either would be multiplied by the bias' positions.
    """
    heads = _Heads(query, key)
    inputs = {"query": query, "key": key, "value": value, **vars(operands)}
    gradients = {name: torch.zeros_like(inputs[name], dtype=torch.float32).contiguous() for name in names}
    totals = {name: heads.view(gradient, _OF_HEADS.get(name, 2)) for name, gradient in gradients.items()}
    grad_out = heads.view(grad_out, 2)
    grad_lse = None if grad_lse is None else heads.view(grad_lse, 1)
    for chunk, part in _parts(heads, query, key, value, operands, scale):
        mine = {name: _narrow(total, chunk) for name, total in totals.items()}
        d_out = _narrow(grad_out, chunk).float()
        d_lse = None if grad_lse is None else _narrow(grad_lse, chunk)
        part.backward(d_out, d_lse, mine, scale)
    return gradients


class _Heads:
    """The dimensions in front."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.kv_heads = key.shape[-3]
        self.group = query.shape[-3] // max(self.kv_heads, 1)
        self.batch = query.shape[:-3]

    def view(self, tensor: Tensor, behind: int, has_heads: bool = True) -> Tensor:
        """`(*batch, H, ...)` or `(*batch, ...)` as `(*batch, Hkv, G, ...)`, missing dimensions as 1."""
        front = tensor.dim() - behind
        if has_heads and front > 0:
            sizes = (
                (1, 1) if tensor.shape[front - 1] == 1 != self.kv_heads * self.group else (self.kv_heads, self.group)
            )
            if tensor.shape[front - 1] == self.kv_heads != self.kv_heads * self.group:
                sizes = (self.kv_heads, 1)
            tensor = tensor.unflatten(front - 1, sizes)
        else:
            tensor = tensor[(slice(None),) * front + (None, None)]
        missing = len(self.batch) + 2 + behind - tensor.dim()
        return tensor[(None,) * missing]
