"""Backward, the queries' side: gradients of queries, their factor columns, slopes, and of what lies beyond a table."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import (
    NOT_SPECIALIZED,
    add_columns,
    load_statistics,
    pitch,
    probabilities,
    score_gradient,
    whole_unit,
)
from .terms import (
    BAND,
    add_distances,
    add_matrix,
    add_product,
    add_table,
    diagonal,
    distances,
    dot_rows,
    key_range,
    load_chunk,
    load_matrix,
    load_rows,
    mask_scores,
    near_keys,
    over,
    products,
    program,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def queries_kernel(
    q, k, v, d_out, level, delta, low, d_lse, d_query, d_columns, d_slopes, d_far, gradient_columns, terms, masks,
    tiles, unit_rest, n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: tl.constexpr, C_V: tl.constexpr, RANK: tl.constexpr, GRADIENT_RANK: tl.constexpr, SPLIT: tl.constexpr,
    EXCESS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, FOLDED: tl.constexpr,
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, their factor columns, and, row by row, slopes and `Far`; each None where not wanted.

    delta comes from rounded outputs, and the LSE is rounded too, so that the rows of P and dS do not quite sum to 1 and
    dLSE. With EXCESS, for gradients that are to be better than the dtype of the queries, this kernel takes the excess
    out of what it sums, and leaves a better delta (and, in fp32, what it and the level lack) to those after it.
    With `unit_rest`, what fp32 leaves of the unit, P, dS and sums of them alone are formed in float64; products of
    them with others are not, but those with columns in float64.
    """
    DTYPE: tl.constexpr = tl.float32 if unit_rest is None else tl.float64
    unit = whole_unit(unit, unit_rest)
    EXACT: tl.constexpr = low is not None
    TOTAL: tl.constexpr = EXACT or d_far is not None
    n_tiles = tl.cdiv(n_q, BLOCK_M)
    i_tile, i_bh, i_o, i_i, i_h, i_kv = program(n_tiles, n_inner, n_heads, group)
    m_first = (n_tiles - 1 - i_tile) * BLOCK_M
    o_row = m_first + tl.arange(0, BLOCK_M)
    o_m = o_row[:, None]
    offset = diagonal(masks, i_o, i_i, offset)
    n_keys, whole, end = key_range(masks, i_o, i_i, m_first, n_k, offset, CAUSAL, BLOCK_M, BLOCK_N)
    # All keys are checked where registers are few: what a second loop needs would stay in them throughout the first.
    if EXACT:
        whole = 0

    b_q = load_rows(q, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C, WIDTH, True)
    b_q_columns = b_q
    if RANK > 0 and RANK == CHUNK:
        b_q_columns = load_chunk(terms.q_columns, 0, i_o, i_i, i_h, m_first, n_q, BLOCK_M, CHUNK, True)
    b_d_out = load_rows(d_out, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C_V, WIDTH_V, True)
    b_level, _, b_delta, _ = load_statistics(level, delta, None, i_bh, o_row, n_q)
    b_level, b_delta = b_level.to(DTYPE), b_delta.to(DTYPE)
    b_d_query = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    b_d_slopes = tl.zeros([BLOCK_M], DTYPE)
    b_excess = tl.zeros([BLOCK_M], DTYPE)
    b_total = tl.zeros([BLOCK_M], DTYPE)
    b_mean_distance = tl.zeros([BLOCK_M], DTYPE)
    b_mean_key = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if GRADIENT_RANK > 0:
        b_d_columns = tl.zeros([BLOCK_M, GRADIENT_RANK], d_columns.dtype.element_ty)
        b_mean_columns = tl.zeros([BLOCK_M, GRADIENT_RANK], d_columns.dtype.element_ty)
    if d_far is not None:
        near_begin, near_end = near_keys(n_q, m_first & -BAND, terms.reach, offset)
        b_before, b_total_before, b_until, b_total_until = b_excess, b_excess, b_excess, b_excess

    for phase in tl.static_range(1 if EXACT else 0, 2):
        for n_first in tl.range(whole if phase == 1 else 0, end if phase == 1 else whole, BLOCK_N):
            o_n = (n_first + tl.arange(0, BLOCK_N))[None, :]
            b_k = load_rows(k, i_o, i_i, i_kv, n_first, n_keys, BLOCK_N, C, WIDTH, phase == 1)
            b_s = products(
                b_q, b_k, q, k, b_q_columns, terms.q_columns, terms.k_columns, i_o, i_i, i_h, i_h, i_kv,
                m_first, n_first, n_q, n_keys, unit, BLOCK_M, BLOCK_N, C, RANK, CHUNK, FOLDED, PRECISION, SUMS,
                phase == 1, DTYPE,
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
                b_d_out, b_v, d_out, v, tl.zeros([BLOCK_M, BLOCK_N], DTYPE), i_o, i_i, i_h, i_kv,
                m_first, n_first, n_q, n_keys, C_V, PRECISION, SUMS,
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
                    terms, i_o, i_i, o_m, o_n, m_first, n_first, n_q, n_keys, offset, BLOCK_M, BLOCK_N, SYMMETRIC,
                    True, DTYPE,
                )  # fmt: skip
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
    b_share = tl.full([BLOCK_M], 1.0, DTYPE)
    if d_far is not None:
        b_behind, b_total_behind = b_excess - b_until, b_total - b_total_until
    if EXACT:
        b_share = tl.where(b_total > 0.0, over(1.0, b_total, b_total), 1.0)
        b_excess *= b_share
        tl.store(low.level + o_place, over(-tl.log(b_share), unit, b_share), mask=o_row < n_q)
    if EXCESS:
        if d_lse is not None:
            b_excess -= tl.load(d_lse + i_bh * n_q + o_row, mask=o_row < n_q, other=0.0)
        b_better = (b_delta + b_excess).to(tl.float32)
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
