"""Attention, backward: scores are recomputed tile by tile, gradients summed in a fixed order, without atomics.

With P the probabilities, `dS = P * (dP - delta)` where `dP = dO V^T` and `delta_i = dO_i . O_i - dLSE_i`
(Dao, FlashAttention-2, 2023, algorithm 2). One kernel walks over the keys for each tile of queries (`queries.py`),
one over the queries for each tile of keys (`keys.py`), and one, for the values of a dense bias, over all that shares a
tile of them (`values.py`); that for a table by distance is in `table.py`. Here is what they share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .terms import LOG2_E, LOWEST, add_product, exponential, load_rows, program

NOT_SPECIALIZED = ["n_q", "n_k", "n_inner", "n_heads", "group", "offset", "unit"]
PITCH = tl.constexpr(64)  # a row's statistics begin at multiples of it: no team's tile has more rows


class Low(NamedTuple):
    """What fp32 leaves of the level and of delta, in their shape."""

    level: Any
    delta: Any


class Far(NamedTuple):
    """Sums of a row's dS over the keys before those near a table's distances, and behind, `(*batch, H, Nq)` each."""

    before: Any
    behind: Any


class Forward(NamedTuple):
    """What the forward pass gave, the gradient of its LSE, or None, and how the output lies (`output.abreast`)."""

    out: Any
    lse: Any
    d_lse: Any
    abreast: bool


@triton.jit(do_not_specialize=["n_q", "n_inner", "n_heads", "unit"])
def delta_kernel(
    d_out, d_lse, out, lse, delta, level, n_q, n_inner, n_heads, unit,
    C_V: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`delta_i = dO_i . O_i - dLSE_i`, and the level of a row, with which `probabilities` compares scores.

    That is its LSE, over unit or times log2(e), but +inf where a row attends nowhere, or there is none in a tile: its
    probabilities are 0 then, as they are where that cannot be held in fp32.
    """
    EXACT: tl.constexpr = out.ptr.dtype.element_ty == tl.float32
    i_tile, i_bh, i_o, i_i, i_h, _ = program(pitch(n_q) // BLOCK_M, n_inner, n_heads, 1)
    m_first = i_tile * BLOCK_M
    b_d_out = load_rows(d_out, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C_V, WIDTH_V, True)
    b_out = load_rows(out, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C_V, WIDTH_V, True)
    b_delta = tl.sum(b_d_out.to(tl.float32) * b_out.to(tl.float32), 1)
    o_row = m_first + tl.arange(0, BLOCK_M)
    b_lse = tl.load(lse + i_bh * n_q + o_row, mask=o_row < n_q, other=float("-inf"))
    if d_lse is not None:
        b_delta -= tl.load(d_lse + i_bh * n_q + o_row, mask=o_row < n_q, other=0.0)
    o_row += i_bh * pitch(n_q)
    tl.store(delta + o_row, b_delta)
    b_level = tl.div_rn(b_lse, unit) if EXACT else b_lse * LOG2_E
    b_level = tl.where(b_level == float("-inf"), LOWEST, b_level)
    b_level = tl.where(b_lse == float("-inf"), float("inf"), b_level)
    tl.store(level + o_row, b_level)


@triton.jit
def pitch(n_q):
    """How far the statistics of one row of `(*batch, H)` are from those of the next."""
    return tl.cdiv(n_q, PITCH) * PITCH


@triton.jit
def load_statistics(level, delta, low, i_bh, o_row, n_q):
    """Level and delta of rows, and the low parts of both; rows beyond the last have no probabilities."""
    o_place = i_bh * pitch(n_q) + o_row
    b_level = tl.load(level + o_place, mask=o_row < n_q, other=float("inf"))
    b_delta = tl.load(delta + o_place, mask=o_row < n_q, other=0.0)
    b_level_low = tl.zeros_like(b_level)
    b_delta_low = b_level_low
    if low is not None:
        b_level_low = tl.load(low.level + o_place, mask=o_row < n_q, other=0.0)
        b_delta_low = tl.load(low.delta + o_place, mask=o_row < n_q, other=0.0)
    return b_level, b_level_low, b_delta, b_delta_low


@triton.jit
def whole_unit(unit, unit_rest):
    """The unit in float64 where it is given what fp32 leaves of it, else as it is."""
    if unit_rest is not None:
        unit = tl.cast(unit, tl.float64) + unit_rest
    return unit


@triton.jit
def score_gradient(b_p, b_dp, b_delta, b_delta_low, EXACT: tl.constexpr):
    """`dS = P * (dP - delta)`."""
    b_dp -= b_delta
    if EXACT:
        b_dp -= b_delta_low
    return b_p * b_dp


@triton.jit
def probabilities(b_s, b_level, b_low, unit, EXACT: tl.constexpr):
    """`exp(unit * s - LSE)`."""
    if EXACT:
        # Scores and level are near each other where it matters: their difference first, which is exact there.
        return exponential(b_s - b_level - b_low, unit, True)
    return tl.exp2(b_s * (unit * LOG2_E) - b_level)


@triton.jit
def add_columns(b_sum, b_ds, b_columns, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """`sum + dS @ columns`. SPLIT: with what the dtype of the columns cannot hold of dS."""
    b_high = b_ds.to(b_columns.dtype)
    b_sum = add_product(b_sum, b_high, b_columns, PRECISION)
    if SPLIT:
        b_sum = add_product(b_sum, (b_ds - b_high.to(tl.float32)).to(b_columns.dtype), b_columns, PRECISION)
    return b_sum
