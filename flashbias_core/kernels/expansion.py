"""Factors that many rows of the batch share, multiplied out to one dense bias, which then costs less than they do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias import plan
from flashbias.operands import Operands

from .call import row_step
from .known import launch_known
from .replay import contiguous, reduced, room
from .terms import Block, dot_features, load_rows

FACTORS = ("q_factor", "k_factor")
TILE, PART = 64, 32  # of the values, and columns at a time


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
    """The product of factors of one dtype that all the batch shares, in that dtype."""
    q, k = contiguous(q_factor), contiguous(k_factor)
    n_q, n_k, rank = q.shape[-2], k.shape[-2], q.shape[-1]
    q_heads, k_heads = q.numel() // (n_q * rank), k.numel() // (n_k * rank)
    heads = max(q_heads, k_heads)
    step = row_step(n_q, q.element_size())
    steps = plan.cdiv(n_k, step)
    values = room(q, (heads, n_q, steps * step))
    launch_known(
        expansion_kernel, (plan.cdiv(n_q, TILE) * plan.cdiv(n_k, TILE) * heads, 1), q_factor.device,
        {"q": _rows(q), "k": _rows(k), "values": values, "n_q": n_q, "n_k": n_k, "q_heads": q_heads, "k_heads": k_heads,
         "steps": steps},
        RANK=rank, STEP=step, TILE=TILE, PART=PART,
    )  # fmt: skip
    return values[..., :n_k]


def _rows(factor: Tensor) -> Block:
    """The rows of all heads, one after the other."""
    return Block(factor, 0, 0, 0, factor.shape[-1])


def _product(a: Tensor, b: Tensor, shape: torch.Size | None = None) -> Tensor:
    """The product in the dtype of `a`, also inside autocast, summed over what a shape has not."""
    with torch.autocast(a.device.type, enabled=False):
        product = a @ b.to(a.dtype)
    return product if shape is None else product.sum_to_size(shape)


@triton.jit(do_not_specialize=["n_q", "n_k", "q_heads", "k_heads", "steps"])
def expansion_kernel(
    q, k, values, n_q, n_k, q_heads, k_heads, steps,
    RANK: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A tile of `q @ k^T` for one head, in rows of so many steps, which are written whole: nothing reads their ends."""
    n_m, n_n = tl.cdiv(n_q, TILE), tl.cdiv(n_k, TILE)
    i_m, i_h = tl.program_id(0) // n_n % n_m, (tl.program_id(0) // (n_n * n_m)).to(tl.int64)
    i_q, i_k = i_h % q_heads, i_h % k_heads
    m_first, n_first = i_m * TILE, tl.program_id(0) % n_n * TILE
    b_values = tl.zeros([TILE, TILE], tl.float32)
    for o_part in tl.range(0, RANK, PART):
        b_q = load_rows(q, 0, 0, 0, i_q * n_q + m_first, (i_q + 1) * n_q, TILE, RANK, PART, True, o_part)
        b_k = load_rows(k, 0, 0, 0, i_k * n_k + n_first, (i_k + 1) * n_k, TILE, RANK, PART, True, o_part)
        b_values = dot_features(b_q, b_k, b_values, "ieee")
    o_m, o_n = m_first + tl.arange(0, TILE)[:, None], n_first + tl.arange(0, TILE)[None, :]
    p_values = values + (i_h * n_q + o_m) * steps * STEP + o_n
    tl.store(p_values, b_values.to(values.dtype.element_ty), mask=(o_m < n_q) & (o_n < steps * STEP))
