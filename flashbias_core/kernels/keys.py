"""Backward, the keys' side: gradients of keys, of values and of the keys' factor columns, for each query head."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import NOT_SPECIALIZED, add_columns, load_statistics, probabilities, score_gradient, whole_unit
from .terms import (
    add_distances,
    add_matrix,
    add_product,
    add_table,
    among,
    diagonal,
    dot_features,
    dot_rows,
    first_key_beyond,
    load_chunk,
    load_matrix,
    load_rows,
    mask_scores,
    products,
    program,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def keys_kernel(
    q, k, v, d_out, level, delta, low, d_key, d_value, d_columns, gradient_columns, terms, masks, tiles,
    unit_rest, n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: tl.constexpr, C_V: tl.constexpr, RANK: tl.constexpr, GRADIENT_RANK: tl.constexpr, SPLIT: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, FOLDED: tl.constexpr,
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, values and the keys' factor columns, for each query head; each None where not wanted.

    Tiles stand on their side, keys by queries, so that P and dS are left operands as they come. With `unit_rest` these
    are formed in float64, as the queries' kernel has it.
    """
    DTYPE: tl.constexpr = tl.float32 if unit_rest is None else tl.float64
    unit = whole_unit(unit, unit_rest)
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
    EXACT: tl.constexpr = low is not None
    if EXACT:  # in one loop, as the queries' kernel has it
        checked = n_q

    k_first = among(n_first, n_keys)
    b_k = load_rows(k, i_o, i_i, i_kv, k_first, n_keys, BLOCK_N, C, WIDTH, True)
    b_k_columns = b_k
    if RANK > 0 and RANK == CHUNK:
        b_k_columns = load_chunk(terms.k_columns, 0, i_o, i_i, i_h, n_first, n_keys, BLOCK_N, CHUNK, True)
    b_v = load_rows(v, i_o, i_i, i_kv, k_first, n_keys, BLOCK_N, C_V, WIDTH_V, True)
    b_d_key = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    b_d_value = tl.zeros([BLOCK_N, WIDTH_V], tl.float32)
    if GRADIENT_RANK > 0:
        b_d_columns = tl.zeros([BLOCK_N, GRADIENT_RANK], d_columns.dtype.element_ty)

    for phase in tl.static_range(1 if EXACT else 2):
        for m_first in tl.range(begin if phase == 0 else checked, checked if phase == 0 else n_q, BLOCK_M):
            o_row = m_first + tl.arange(0, BLOCK_M)
            o_m = o_row[None, :]
            b_q = load_rows(q, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C, WIDTH, True)
            if not EXACT:
                b_s = products(
                    b_k, b_q, k, q, b_k_columns, terms.k_columns, terms.q_columns, i_o, i_i, i_h, i_kv, i_h,
                    n_first, m_first, n_keys, n_q, unit, BLOCK_N, BLOCK_M, C, RANK, CHUNK, FOLDED, PRECISION, SUMS,
                    True,
                )  # fmt: skip
            else:
                # In fp32 the very products with which the statistics were improved, so that their errors cancel.
                b_q_columns = b_q
                if RANK > 0 and RANK == CHUNK:
                    b_q_columns = load_chunk(terms.q_columns, 0, i_o, i_i, i_h, m_first, n_q, BLOCK_M, CHUNK, True)
                b_s = products(
                    b_q, b_k, q, k, b_q_columns, terms.q_columns, terms.k_columns, i_o, i_i, i_h, i_h, i_kv,
                    m_first, n_first, n_q, n_keys, unit, BLOCK_M, BLOCK_N, C, RANK, CHUNK, FOLDED, PRECISION, SUMS,
                    True, DTYPE,
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
            b_p = probabilities(b_s, b_level[None, :], b_low[None, :], unit, EXACT)
            b_d_out = load_rows(d_out, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C_V, WIDTH_V, True)
            if d_value is not None:
                b_d_value = add_product(b_d_value, b_p.to(b_d_out.dtype), b_d_out, PRECISION)  # [N, M] @ [M, Cv]
            if not EXACT:
                b_dp = dot_features(b_v, b_d_out, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
            else:
                b_dp = dot_rows(
                    b_d_out, b_v, d_out, v, tl.zeros([BLOCK_M, BLOCK_N], DTYPE), i_o, i_i, i_h, i_kv,
                    m_first, n_first, n_q, n_keys, C_V, PRECISION, SUMS,
                )  # fmt: skip
                b_dp = tl.trans(b_dp)
            b_ds = score_gradient(b_p, b_dp, b_delta[None, :], b_delta_low[None, :], EXACT)
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
