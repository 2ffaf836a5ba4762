"""Attention, backward: scores are recomputed tile by tile, gradients summed in a fixed order, without atomics.

With P the probabilities, `dS = P * (dP - delta)` where `dP = dO V^T` and `delta_i = dO_i . O_i - dLSE_i`
(Dao, FlashAttention-2, 2023, algorithm 2). One kernel walks over the keys for each tile of queries, one over the
queries for each tile of keys, and one, for the values of a dense bias, over all that shares a tile of them; that for
a table by distance is in `table.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .terms import (
    BAND,
    LOG2_E,
    add_distances,
    add_matrix,
    add_product,
    add_table,
    diagonal,
    distances,
    dot_features,
    dot_rows,
    exponential,
    first_key_beyond,
    key_range,
    load_chunk,
    load_matrix,
    load_rows,
    mask_scores,
    near_keys,
    products,
    program,
)

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
    """What the forward pass gave, and the gradient of its LSE, or None."""

    out: Any
    lse: Any
    d_lse: Any


@triton.jit(do_not_specialize=["n_q", "n_inner", "n_heads", "unit"])
def delta_kernel(
    d_out, d_lse, out, lse, delta, level, n_q, n_inner, n_heads, unit,
    C_V: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`delta_i = dO_i . O_i - dLSE_i`, and the level of a row, with which `probabilities` compares scores.

    That is its LSE, over unit or times log2(e), but +inf where a row attends nowhere, or there is none in a tile: its
    probabilities are 0 then.
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
    b_level = tl.where(b_lse == float("-inf"), float("inf"), tl.div_rn(b_lse, unit) if EXACT else b_lse * LOG2_E)
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def queries_kernel(
    q, k, v, d_out, level, delta, low, d_lse, d_query, d_columns, d_slopes, d_far, gradient_columns, terms, masks,
    tiles, n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: tl.constexpr, C_V: tl.constexpr, RANK: tl.constexpr, GRADIENT_RANK: tl.constexpr, SPLIT: tl.constexpr,
    EXCESS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, FOLDED: tl.constexpr,
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, their factor columns, and, row by row, slopes and `Far`; each None where not wanted.

    delta comes from rounded outputs, and the LSE is rounded too, so that the rows of P and dS do not quite sum to 1 and
    dLSE. With EXCESS, for gradients that are to be better than the dtype of the queries, this kernel takes the excess
    out of what it sums, and leaves a better delta (and, in fp32, what it and the level lack) to those after it.
    """
    EXACT: tl.constexpr = low is not None
    TOTAL: tl.constexpr = EXACT or d_far is not None
    n_tiles = tl.cdiv(n_q, BLOCK_M)
    i_tile, i_bh, i_o, i_i, i_h, i_kv = program(n_tiles, n_inner, n_heads, group)
    m_first = (n_tiles - 1 - i_tile) * BLOCK_M
    o_row = m_first + tl.arange(0, BLOCK_M)
    o_m = o_row[:, None]
    offset = diagonal(masks, i_o, i_i, offset)
    n_keys, whole, end = key_range(masks, i_o, i_i, m_first, n_k, offset, CAUSAL, BLOCK_M, BLOCK_N)

    b_q = load_rows(q, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C, WIDTH, True)
    b_q_columns = b_q
    if RANK > 0 and RANK == CHUNK:
        b_q_columns = load_chunk(terms.q_columns, 0, i_o, i_i, i_h, m_first, n_q, BLOCK_M, CHUNK, True)
    b_d_out = load_rows(d_out, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C_V, WIDTH_V, True)
    b_level, _, b_delta, _ = load_statistics(level, delta, None, i_bh, o_row, n_q)
    b_d_query = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    b_d_slopes = tl.zeros([BLOCK_M], tl.float32)
    b_excess = tl.zeros([BLOCK_M], tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    b_mean_distance = tl.zeros([BLOCK_M], tl.float32)
    b_mean_key = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if GRADIENT_RANK > 0:
        b_d_columns = tl.zeros([BLOCK_M, GRADIENT_RANK], tl.float32)
        b_mean_columns = tl.zeros([BLOCK_M, GRADIENT_RANK], tl.float32)
    if d_far is not None:
        near_begin, near_end = near_keys(n_q, m_first & -BAND, terms.reach, offset)
        b_before, b_total_before, b_until, b_total_until = b_excess, b_excess, b_excess, b_excess

    for phase in tl.static_range(2):
        for n_first in tl.range(whole if phase == 1 else 0, end if phase == 1 else whole, BLOCK_N):
            o_n = (n_first + tl.arange(0, BLOCK_N))[None, :]
            b_k = load_rows(k, i_o, i_i, i_kv, n_first, n_keys, BLOCK_N, C, WIDTH, phase == 1)
            b_s = products(
                b_q, b_k, q, k, b_q_columns, terms.q_columns, terms.k_columns, i_o, i_i, i_h, i_h, i_kv,
                m_first, n_first, n_q, n_keys, unit, BLOCK_M, BLOCK_N, C, RANK, CHUNK, FOLDED, PRECISION, phase == 1,
            )  # fmt: skip
            b_s = add_distances(
                b_s, terms, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, offset, unit,
                BLOCK_M, BLOCK_N, SYMMETRIC, True,
            )  # fmt: skip
            b_matrix = load_matrix(
                terms, tiles, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, phase == 1, True
            )
            b_s = add_matrix(b_s, b_matrix, unit)
            b_s = add_table(b_s, terms, i_o, i_i, i_h, o_m, o_n, m_first, n_first, offset, unit, BLOCK_M, BLOCK_N)
            b_s = mask_scores(
                b_s, masks, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, offset, CAUSAL, phase == 1
            )
            b_p = probabilities(b_s, b_level[:, None], 0.0, unit, EXACT)
            b_v = load_rows(v, i_o, i_i, i_kv, n_first, n_keys, BLOCK_N, C_V, WIDTH_V, phase == 1)
            b_dp = dot_rows(
                b_d_out, b_v, d_out, v, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), i_o, i_i, i_h, i_kv,
                m_first, n_first, n_q, n_keys, C_V, PRECISION,
            )  # fmt: skip
            b_ds = score_gradient(b_p, b_dp, b_delta[:, None], 0.0, False)
            if EXCESS:
                b_excess += tl.sum(b_ds, 1)
            if TOTAL:
                b_total += tl.sum(b_p, 1)
            if d_far is not None:
                # The sums so far: when the walk comes to the near keys, and when it leaves them.
                b_before = tl.where(n_first < near_begin, b_excess, b_before)
                b_total_before = tl.where(n_first < near_begin, b_total, b_total_before)
                b_until = tl.where(n_first < near_end, b_excess, b_until)
                b_total_until = tl.where(n_first < near_end, b_total, b_total_until)
            if d_slopes is not None:
                b_distance = distances(
                    terms, i_o, i_i, o_m, o_n, m_first, n_first, n_q, n_keys, offset, BLOCK_M, BLOCK_N, SYMMETRIC, True
                )
                b_d_slopes += tl.sum(b_ds * b_distance, 1)
                b_mean_distance += tl.sum(b_p * b_distance, 1)
            if d_query is not None:
                b_d_query = add_product(b_d_query, b_ds.to(b_k.dtype), b_k, PRECISION)  # [M, N] @ [N, C]
                if EXACT:
                    b_mean_key = add_product(b_mean_key, b_p.to(b_k.dtype), b_k, PRECISION)
            if GRADIENT_RANK > 0:
                b_columns = load_chunk(
                    gradient_columns, 0, i_o, i_i, i_h, n_first, n_keys, BLOCK_N, GRADIENT_RANK, phase == 1
                )
                b_d_columns = add_columns(b_d_columns, b_ds, b_columns, SPLIT, PRECISION)  # [M, N] @ [N, R]
                if EXCESS:
                    # [M, N] @ [N, R]
                    b_mean_columns = add_product(b_mean_columns, b_p.to(b_columns.dtype), b_columns, PRECISION)

    o_place = i_bh * pitch(n_q) + o_row
    b_share = tl.full([BLOCK_M], 1.0, tl.float32)
    if d_far is not None:
        b_behind, b_total_behind = b_excess - b_until, b_total - b_total_until
    if EXACT:
        b_share = tl.where(b_total > 0.0, tl.div_rn(1.0, b_total), 1.0)
        b_excess *= b_share
        tl.store(low.level + o_place, tl.div_rn(-tl.log(b_share), unit), mask=o_row < n_q)
    if EXCESS:
        if d_lse is not None:
            b_excess -= tl.load(d_lse + i_bh * n_q + o_row, mask=o_row < n_q, other=0.0)
        b_better = b_delta + b_excess
        tl.store(delta + o_place, b_better, mask=o_row < n_q)
        if EXACT:
            tl.store(low.delta + o_place, b_excess - (b_better - b_delta), mask=o_row < n_q)
    # Added, not subtracted: where products' results are negated, ptxas negates what was in their place before.
    b_lack = tl.zeros_like(b_excess) - b_excess
    p_row = i_bh * n_q + o_m
    if d_query is not None:
        o_c = tl.arange(0, WIDTH)[None, :]
        if EXACT:
            b_d_query = (b_d_query + b_lack[:, None] * b_mean_key) * b_share[:, None]
        b_d_query = b_d_query * unit
        tl.store(d_query + p_row * C + o_c, b_d_query.to(d_query.dtype.element_ty), mask=(o_m < n_q) & (o_c < C))
    if GRADIENT_RANK > 0:
        o_r = tl.arange(0, GRADIENT_RANK)[None, :]
        if EXCESS:
            b_d_columns = (b_d_columns + b_lack[:, None] * b_mean_columns) * b_share[:, None]
        tl.store(d_columns + p_row * GRADIENT_RANK + o_r, b_d_columns, mask=o_m < n_q)
    if d_slopes is not None:
        b_d_slopes = (b_d_slopes + b_lack * b_mean_distance) * b_share
        tl.store(d_slopes + i_bh * n_q + o_row, b_d_slopes, mask=o_row < n_q)
    if d_far is not None:
        b_before = (b_before + b_lack * b_total_before) * b_share
        b_behind = (b_behind + b_lack * b_total_behind) * b_share
        tl.store(d_far.before + i_bh * n_q + o_row, b_before, mask=o_row < n_q)
        tl.store(d_far.behind + i_bh * n_q + o_row, b_behind, mask=o_row < n_q)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def keys_kernel(
    q, k, v, d_out, level, delta, low, d_key, d_value, d_columns, gradient_columns, terms, masks, tiles,
    n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: tl.constexpr, C_V: tl.constexpr, RANK: tl.constexpr, GRADIENT_RANK: tl.constexpr, SPLIT: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, FOLDED: tl.constexpr,
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, values and the keys' factor columns, for each query head; each None where not wanted.

    Tiles stand on their side, keys by queries, so that P and dS are left operands as they come.
    """
    i_tile, i_bh, i_o, i_i, i_h, i_kv = program(tl.cdiv(n_k, BLOCK_N), n_inner, n_heads, group)
    n_first = i_tile * BLOCK_N
    o_n = (n_first + tl.arange(0, BLOCK_N))[:, None]
    offset = diagonal(masks, i_o, i_i, offset)
    n_keys = first_key_beyond(masks, i_o, i_i, n_k)
    # Queries [begin, checked) need the number of keys or the diagonal checked; [checked, n_q) do not.
    begin = n_first * 0
    if CAUSAL:
        begin = tl.maximum(n_first - offset, 0) // BLOCK_M * BLOCK_M
    checked = begin
    if CAUSAL:
        checked = tl.maximum(tl.cdiv(tl.maximum(n_first + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M, begin)
    checked = tl.where(n_first + BLOCK_N > n_keys, n_q, tl.minimum(checked, n_q))
    begin = tl.where(n_first >= n_keys, n_q, begin)

    b_k = load_rows(k, i_o, i_i, i_kv, n_first, n_keys, BLOCK_N, C, WIDTH, True)
    b_k_columns = b_k
    if RANK > 0 and RANK == CHUNK:
        b_k_columns = load_chunk(terms.k_columns, 0, i_o, i_i, i_h, n_first, n_keys, BLOCK_N, CHUNK, True)
    b_v = load_rows(v, i_o, i_i, i_kv, n_first, n_keys, BLOCK_N, C_V, WIDTH_V, True)
    b_d_key = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    b_d_value = tl.zeros([BLOCK_N, WIDTH_V], tl.float32)
    if GRADIENT_RANK > 0:
        b_d_columns = tl.zeros([BLOCK_N, GRADIENT_RANK], tl.float32)

    for phase in tl.static_range(2):
        for m_first in tl.range(begin if phase == 0 else checked, checked if phase == 0 else n_q, BLOCK_M):
            o_row = m_first + tl.arange(0, BLOCK_M)
            o_m = o_row[None, :]
            b_q = load_rows(q, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C, WIDTH, True)
            if low is None:
                b_s = products(
                    b_k, b_q, k, q, b_k_columns, terms.k_columns, terms.q_columns, i_o, i_i, i_h, i_kv, i_h,
                    n_first, m_first, n_keys, n_q, unit, BLOCK_N, BLOCK_M, C, RANK, CHUNK, FOLDED, PRECISION, True,
                )  # fmt: skip
            else:
                # In fp32 the very products with which the statistics were improved, so that their errors cancel.
                b_q_columns = b_q
                if RANK > 0 and RANK == CHUNK:
                    b_q_columns = load_chunk(terms.q_columns, 0, i_o, i_i, i_h, m_first, n_q, BLOCK_M, CHUNK, True)
                b_s = products(
                    b_q, b_k, q, k, b_q_columns, terms.q_columns, terms.k_columns, i_o, i_i, i_h, i_h, i_kv,
                    m_first, n_first, n_q, n_keys, unit, BLOCK_M, BLOCK_N, C, RANK, CHUNK, FOLDED, PRECISION, True,
                )  # fmt: skip
                b_s = tl.trans(b_s)
            b_s = add_distances(
                b_s, terms, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, offset, unit,
                BLOCK_M, BLOCK_N, SYMMETRIC, False,
            )  # fmt: skip
            b_matrix = load_matrix(
                terms, tiles, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, phase == 0, False
            )
            b_s = add_matrix(b_s, b_matrix, unit)
            b_s = add_table(b_s, terms, i_o, i_i, i_h, o_m, o_n, m_first, n_first, offset, unit, BLOCK_M, BLOCK_N)
            b_s = mask_scores(
                b_s, masks, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, offset, CAUSAL, phase == 0
            )
            b_level, b_low, b_delta, b_delta_low = load_statistics(level, delta, low, i_bh, o_row, n_q)
            b_p = probabilities(b_s, b_level[None, :], b_low[None, :], unit, low is not None)
            b_d_out = load_rows(d_out, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C_V, WIDTH_V, True)
            if d_value is not None:
                b_d_value = add_product(b_d_value, b_p.to(b_d_out.dtype), b_d_out, PRECISION)  # [N, M] @ [M, Cv]
            if low is None:
                b_dp = dot_features(b_v, b_d_out, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
            else:
                b_dp = dot_rows(
                    b_d_out, b_v, d_out, v, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), i_o, i_i, i_h, i_kv,
                    m_first, n_first, n_q, n_keys, C_V, PRECISION,
                )  # fmt: skip
                b_dp = tl.trans(b_dp)
            b_ds = score_gradient(b_p, b_dp, b_delta[None, :], b_delta_low[None, :], low is not None)
            if d_key is not None:
                b_d_key = add_product(b_d_key, b_ds.to(b_q.dtype), b_q, PRECISION)  # [N, M] @ [M, C]
            if GRADIENT_RANK > 0:
                b_columns = load_chunk(gradient_columns, 0, i_o, i_i, i_h, m_first, n_q, BLOCK_M, GRADIENT_RANK, True)
                b_d_columns = add_columns(b_d_columns, b_ds, b_columns, SPLIT, PRECISION)  # [N, M] @ [M, R]

    p_row = i_bh * n_k + o_n
    if d_key is not None:
        o_c = tl.arange(0, WIDTH)[None, :]
        b_d_key = b_d_key * unit
        tl.store(d_key + p_row * C + o_c, b_d_key.to(d_key.dtype.element_ty), mask=(o_n < n_k) & (o_c < C))
    if d_value is not None:
        o_c = tl.arange(0, WIDTH_V)[None, :]
        tl.store(d_value + p_row * C_V + o_c, b_d_value.to(d_value.dtype.element_ty), mask=(o_n < n_k) & (o_c < C_V))
    if GRADIENT_RANK > 0:
        o_r = tl.arange(0, GRADIENT_RANK)[None, :]
        tl.store(d_columns + p_row * GRADIENT_RANK + o_r, b_d_columns, mask=o_n < n_k)


@triton.jit
def member(i_own, i_shared, n_inner_shared, n_heads_shared, n_inner, n_heads):
    """Outer, inner and head of the batch-head that is number `i_shared` of those that share what is number `i_own`."""
    n_own_heads, n_own_inner = n_heads // n_heads_shared, n_inner // n_inner_shared
    b_own, i_b = i_own // n_own_heads, i_shared // n_heads_shared
    i_h = i_own % n_own_heads + i_shared % n_heads_shared
    i_i = b_own % n_own_inner + i_b % n_inner_shared
    i_o = b_own // n_own_inner + i_b // n_inner_shared
    return i_o.to(tl.int64), i_i.to(tl.int64), i_h.to(tl.int64)


@triton.jit
def tile_gradient(
    q, k, v, d_out, level, delta, low, terms, masks, b_matrix, i_o, i_i, i_h, m_first, n_first,
    n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: tl.constexpr, C_V: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, FOLDED: tl.constexpr,
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of one tile, `[BLOCK_M, BLOCK_N]`; `b_matrix` is its tile of the dense bias, or None."""
    i_bh = (i_o * n_inner + i_i) * n_heads + i_h
    i_kv = i_h // group
    o_row = m_first + tl.arange(0, BLOCK_M)
    o_m = o_row[:, None]
    o_n = (n_first + tl.arange(0, BLOCK_N))[None, :]
    offset = diagonal(masks, i_o, i_i, offset)
    n_keys = first_key_beyond(masks, i_o, i_i, n_k)
    b_q = load_rows(q, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C, WIDTH, True)
    b_q_columns = b_q
    if RANK > 0 and RANK == CHUNK:
        b_q_columns = load_chunk(terms.q_columns, 0, i_o, i_i, i_h, m_first, n_q, BLOCK_M, CHUNK, True)
    b_k = load_rows(k, i_o, i_i, i_kv, n_first, n_keys, BLOCK_N, C, WIDTH, True)
    b_s = products(
        b_q, b_k, q, k, b_q_columns, terms.q_columns, terms.k_columns, i_o, i_i, i_h, i_h, i_kv,
        m_first, n_first, n_q, n_keys, unit, BLOCK_M, BLOCK_N, C, RANK, CHUNK, FOLDED, PRECISION, True,
    )  # fmt: skip
    b_s = add_distances(
        b_s, terms, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, offset, unit,
        BLOCK_M, BLOCK_N, SYMMETRIC, True,
    )  # fmt: skip
    b_s = add_matrix(b_s, b_matrix, unit)
    b_s = add_table(b_s, terms, i_o, i_i, i_h, o_m, o_n, m_first, n_first, offset, unit, BLOCK_M, BLOCK_N)
    b_s = mask_scores(b_s, masks, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, offset, CAUSAL, True)
    b_level, b_low, b_delta, b_delta_low = load_statistics(level, delta, low, i_bh, o_row, n_q)
    b_p = probabilities(b_s, b_level[:, None], b_low[:, None], unit, low is not None)
    b_d_out = load_rows(d_out, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C_V, WIDTH_V, True)
    b_v = load_rows(v, i_o, i_i, i_kv, n_first, n_keys, BLOCK_N, C_V, WIDTH_V, True)
    b_dp = dot_rows(
        b_d_out, b_v, d_out, v, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), i_o, i_i, i_h, i_kv,
        m_first, n_first, n_q, n_keys, C_V, PRECISION,
    )  # fmt: skip
    return score_gradient(b_p, b_dp, b_delta[:, None], b_delta_low[:, None], low is not None)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "n_outer_shared", "n_inner_shared", "n_heads_shared", "n_splits"])
def values_kernel(
    q, k, v, d_out, level, delta, low, d_values, terms, masks, tiles,
    n_outer_shared, n_inner_shared, n_heads_shared, n_splits,
    n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: tl.constexpr, C_V: tl.constexpr, RANK: tl.constexpr, ONE_ROW: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, FOLDED: tl.constexpr,
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of a dense bias: dS summed over the `n_*_shared` batches and heads (with ONE_ROW, rows) that share it.

    A program sums one of `n_splits` parts of the members for one tile, into a plane of its own.
    """
    n_m, n_n = tl.cdiv(n_q, BLOCK_M), tl.cdiv(n_k, BLOCK_N)
    n_m_tiles = 1 if ONE_ROW else n_m
    i_n = tl.program_id(0) % n_n
    i_rest = tl.program_id(0) // n_n
    i_m, i_rest = i_rest % n_m_tiles, i_rest // n_m_tiles
    i_split, i_own = i_rest % n_splits, i_rest // n_splits
    n_members = n_outer_shared * n_inner_shared * n_heads_shared
    if ONE_ROW:
        n_members *= n_m
    first, last = n_members * i_split // n_splits, n_members * (i_split + 1) // n_splits
    n_first = i_n * BLOCK_N
    b_d_values = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # All members have the same tile of the bias.
    m_first = 0 if ONE_ROW else i_m * BLOCK_M
    o_o, o_i, o_h = member(i_own, 0, n_inner_shared, n_heads_shared, n_inner, n_heads)
    b_matrix = load_matrix(
        terms, tiles, o_o, o_i, o_h, (m_first + tl.arange(0, BLOCK_M))[:, None],
        (n_first + tl.arange(0, BLOCK_N))[None, :], m_first, n_first, n_q, n_k, True, True,
    )  # fmt: skip

    for i_member in tl.range(first, last):
        i_shared = i_member
        if ONE_ROW:
            m_first, i_shared = i_member % n_m * BLOCK_M, i_member // n_m
        i_o, i_i, i_h = member(i_own, i_shared, n_inner_shared, n_heads_shared, n_inner, n_heads)
        b_d_values += tile_gradient(
            q, k, v, d_out, level, delta, low, terms, masks, b_matrix, i_o, i_i, i_h, m_first, n_first,
            n_q, n_k, n_inner, n_heads, group, offset, unit,
            C, C_V, RANK, WIDTH, WIDTH_V, CHUNK, FOLDED, CAUSAL, SYMMETRIC, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    n_own = tl.num_programs(0) // (n_n * n_m_tiles * n_splits)
    p_plane = d_values + (i_split * n_own + i_own).to(tl.int64) * (1 if ONE_ROW else n_q) * n_k
    o_n = n_first + tl.arange(0, BLOCK_N)
    if ONE_ROW:
        tl.store(p_plane + o_n, tl.sum(b_d_values, 0), mask=o_n < n_k)
    else:
        o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        p_values = p_plane + o_m.to(tl.int64) * n_k + o_n[None, :]
        tl.store(p_values, b_d_values, mask=(o_m < n_q) & (o_n[None, :] < n_k))


@triton.jit(do_not_specialize=["n", "n_parts"])
def sum_parts_kernel(parts, out, n, n_parts, BLOCK: tl.constexpr):
    """`out = sum_i parts[i]`, of n entries each."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(n_parts):
        b_sum += tl.load(parts + o, mask=o < n, other=0.0)
        parts += n
    tl.store(out + o, b_sum.to(out.dtype.element_ty), mask=o < n)
