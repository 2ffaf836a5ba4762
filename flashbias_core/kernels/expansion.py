"""Factors that many rows of the batch share, multiplied out to one dense bias, which then costs less than they do."""

from __future__ import annotations

import torch
from torch import Tensor

from flashbias import plan
from flashbias.operands import Operands

from .call import row_step
from .replay import done, reduced, room_by

FACTORS = ("q_factor", "k_factor")


def expanded(query: Tensor, n_k: int, operands: Operands) -> Operands | None:
    """The operands with values `(H or 1, Nq, Nk)` in place of the factors, or None where those stay.

    Values have the dtype of the factors, as in an eager computation, and rows as kernels read them: no copy is needed.
    """
    q_factor, k_factor = operands.q_factor, operands.k_factor
    if q_factor is None or k_factor is None or operands.causal or operands.factor_unit != 1.0:
        return None
    others = (value for name, value in operands.items() if name not in FACTORS and isinstance(value, Tensor))
    if any(True for _ in others) or not plan.expands(query, n_k, q_factor, k_factor):
        return None
    return Operands(values=_in_rows(q_factor, k_factor), offset=operands.offset)


def factor_gradients(d_values: Tensor, operands: Operands, names: set[str]) -> dict[str, Tensor]:
    """Gradients of the factors from that of the values they were multiplied out to, summed over what they share."""
    q_factor, k_factor = operands.q_factor, operands.k_factor
    assert q_factor is not None
    assert k_factor is not None
    made = {}
    if "q_factor" in names:
        made["q_factor"] = reduced(_product, d_values, k_factor, q_factor.shape)
    if "k_factor" in names:
        made["k_factor"] = reduced(_product, d_values.mT, q_factor, k_factor.shape)
    return made


def _in_rows(q_factor: Tensor, k_factor: Tensor) -> Tensor:
    """The product of factors that all the batch shares, in the dtype of the first."""
    q, k = (factor.view(-1, *factor.shape[-2:]) for factor in (q_factor, k_factor.to(q_factor.dtype)))
    heads, n_q, n_k = max(len(q), len(k)), q.shape[1], k.shape[1]
    step = row_step(n_q, q.element_size())
    pitch = plan.cdiv(n_k, step) * step
    values = room_by(Tensor.new_empty_strided, q, (heads, n_q, n_k), (n_q * pitch, pitch, 1))
    return done(_multiply, q.expand(heads, -1, -1), k.expand(heads, -1, -1).mT, values)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.bmm(a, b, out=out)  # in place, since rows of `out` are contiguous


def _product(a: Tensor, b: Tensor, shape: torch.Size | None = None) -> Tensor:
    """The product in the dtype of `a`, also inside autocast, summed over what a shape has not."""
    with torch.autocast(a.device.type, enabled=False):
        product = a @ b.to(a.dtype)
    return product if shape is None else product.sum_to_size(shape)
