"""Attention on the CPU: blocks of queries against all their keys, in fp32 or float64, recomputed on the way back.

`cpu_parts.py` cuts a call into parts and blocks and forms their scores; `cpu_blocks.py` has the arithmetic on a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import plan
from .cpu_blocks import accumulate, exponentiate, multiply, sum_along
from .cpu_parts import as_matrices, parts
from .operands import TOTALS, Operands
from .output import new_output

COPIED = 4  # scores that cost as much as an entry of keys or values, which float64 has copied


def again(known: object, tensors: object, make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What `make()` gives: here nothing is spared by what is known of calls before."""
    return make()


# Inside autocast the products would be formed in half precision.
@torch.autocast("cpu", enabled=False)
def forward(
    query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float, wanted: object = None
) -> tuple[Tensor, Tensor]:
    """Output `(*batch, H, Nq, Cv)` in the dtype of query, and LSE `(*batch, H, Nq)` in fp32.

    Which gradients are `wanted` changes nothing here.
    """
    out = new_output(query, value.shape[-1]).zero_()
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    dtype = _dtype(query, key, value, operands)
    for part in parts(query, key, value, operands, scale, {"out": (out, 2), "lse": (lse, 1)}, dtype):
        for rows, n in part.blocks():
            weights = part.scores(rows, n, part.distance(rows, n))
            top, total = exponentiate(weights)
            product = multiply(weights, part.value[..., :n, :])
            # A row that attends anywhere has a total of at least 1.
            part["out"][..., rows, :] = product.div_(total.clamp(min=1.0))
            part["lse"][..., rows] = total.log_().add_(top).squeeze(-1)
    return out, lse


@torch.autocast("cpu", enabled=False)
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
    """Gradients of the inputs of these names, in their shapes, in fp32, or in float64 where the input is.

    The weights and the row sums of `P dP` come from the recomputed scores and not from `lse` and `out`, whose
    rounding errors the gradients of slopes and coordinates would multiply by distances. Where inputs are fp32,
    gradients that are sums over all scores, of slopes and tables, come from scores in float64 however many there are.
    """
    dtype = _dtype(query, key, value, operands)
    totals = names & TOTALS if query.dtype == dtype == torch.float32 else set()
    gradients: dict[str, Tensor] = {}
    # Each by itself: a gradient does not depend on which others are wanted.
    for some, its in ((names - totals, dtype), (totals, torch.float64)):
        if some:
            gradients |= _gradients(grad_out, grad_lse, query, key, value, operands, scale, some, its)
    return gradients


def _dtype(query: Tensor, key: Tensor, value: Tensor, operands: Operands) -> torch.dtype:
    """That in which a call is computed: float64 for few scores in fp32, and, unless factors are in float64 themselves,
    few keys and values, which it copies."""
    scores, copied = query.shape[:-1].numel() * key.shape[-2], key.numel() + value.numel()
    few = plan.is_few(scores if operands.in_doubles else max(scores, COPIED * copied))
    return torch.float64 if few and query.dtype == torch.float32 else torch.float32


def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, operands: Operands,
    scale: float, names: set[str], dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """What `backward` gives, computed in a dtype."""
    inputs = {"query": query, "key": key, "value": value, **vars(operands)}
    wide = {name: torch.promote_types(inputs[name].dtype, torch.float32) for name in names}
    gradients = {name: inputs[name].new_zeros(inputs[name].shape, dtype=wide[name]) for name in names}
    extra = {f"grad {name}": (as_matrices(name, gradient), 2) for name, gradient in gradients.items()}
    extra["grad out"] = grad_out, 2
    if grad_lse is not None:
        extra["grad lse"] = grad_lse, 1
    c = query.shape[-1]
    for part in parts(query, key, value, operands, scale, extra, dtype):
        d_key, d_value = torch.zeros_like(part.key), torch.zeros_like(part.value)
        for rows, n in part.blocks():
            distance = part.distance(rows, n)
            weights = part.scores(rows, n, distance)
            _, total = exponentiate(weights)
            weights.div_(total.clamp(min=1.0))
            d_out = part["grad out"][..., rows, :].to(dtype)
            if "value" in names:
                accumulate(d_value[..., :n, :], weights, d_out)
            if names == {"value"}:
                continue
            d_scores = multiply(d_out, part.value[..., :n, :].mT, part.space[1])
            spare = part.space[2, : weights.numel()].view(weights.shape)
            for _ in range(2):  # the second time for what the rounding of the first has left
                d_scores.sub_(torch.mul(weights, d_scores, out=spare).sum(-1, keepdim=True))
            d_lse = part["grad lse"][..., rows, None] if grad_lse is not None else None
            if d_lse is not None:
                d_scores.add_(d_lse)
            d_scores.mul_(weights)
            if names & {"query", "q_factor"}:
                d_query = multiply(d_scores, part.key[..., :n, :])
                part.add("query", d_query[..., :c].mul_(scale), rows)
                part.add("q_factor", d_query[..., c:].mul_(operands.factor_unit), rows)
            if names & {"key", "k_factor"}:
                accumulate(d_key[..., :n, :], d_scores, part.query[..., rows, :])
            part.add("values", d_scores, rows, slice(n))
            part.add_table(d_scores, rows)
            if "slopes" in names and distance is not None:
                part.add("slopes", sum_along(distance, weights, d_scores, d_lse, spare))
        part.add("value", d_value)
        part.add("key", d_key[..., :c])
        part.add("k_factor", d_key[..., c:])
    return gradients
