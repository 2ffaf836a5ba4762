"""Backward of a dense bias: a tile's scores have their gradients summed over all that shares it."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import NOT_SPECIALIZED, load_statistics, probabilities, score_gradient, whole_unit
from .terms import (
    add_distances,
    add_matrix,
    add_table,
    among,
    diagonal,
    dot_rows,
    first_key_beyond,
    load_chunk,
    load_matrix,
    load_rows,
    mask_scores,
    products,
)


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
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dS of one tile, `[BLOCK_M, BLOCK_N]` in DTYPE; `b_matrix` is its tile of the dense bias, or None."""
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
    k_first = among(n_first, n_keys)
    b_k = load_rows(k, i_o, i_i, i_kv, k_first, n_keys, BLOCK_N, C, WIDTH, True)
    b_s = products(
        b_q, b_k, q, k, b_q_columns, terms.q_columns, terms.k_columns, i_o, i_i, i_h, i_h, i_kv,
        m_first, k_first, n_q, n_keys, unit, BLOCK_M, BLOCK_N, C, RANK, CHUNK, FOLDED, PRECISION, SUMS, True,
        DTYPE,
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
    b_v = load_rows(v, i_o, i_i, i_kv, k_first, n_keys, BLOCK_N, C_V, WIDTH_V, True)
    b_dp = dot_rows(
        b_d_out, b_v, d_out, v, tl.zeros([BLOCK_M, BLOCK_N], DTYPE), i_o, i_i, i_h, i_kv,
        m_first, k_first, n_q, n_keys, C_V, PRECISION, SUMS,
    )  # fmt: skip
    if low is not None:  # where there are no keys, what was read of values may be NaN
        b_dp = tl.where(o_n < n_keys, b_dp, 0.0)
    return score_gradient(b_p, b_dp, b_delta[:, None], b_delta_low[:, None], low is not None)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "n_outer_shared", "n_inner_shared", "n_heads_shared", "n_splits"])
def values_kernel(
    q, k, v, d_out, level, delta, low, d_values, terms, masks, tiles,
    n_outer_shared, n_inner_shared, n_heads_shared, n_splits, unit_rest,
    n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: tl.constexpr, C_V: tl.constexpr, RANK: tl.constexpr, ONE_ROW: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, FOLDED: tl.constexpr,
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of a dense bias: dS summed over the `n_*_shared` batches and heads (with ONE_ROW, rows) that share it.

    A program sums one of `n_splits` parts of the members for one tile, into a plane of its own. With `unit_rest` it
    does so in float64, as the queries' kernel has it.
    """
    DTYPE: tl.constexpr = tl.float32 if unit_rest is None else tl.float64
    unit = whole_unit(unit, unit_rest)
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
    b_d_values = tl.zeros([BLOCK_M, BLOCK_N], DTYPE)
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
            C, C_V, RANK, WIDTH, WIDTH_V, CHUNK, FOLDED, CAUSAL, SYMMETRIC, PRECISION, SUMS, BLOCK_M, BLOCK_N,
            DTYPE,
        )  # fmt: skip

    n_own = tl.num_programs(0) // (n_n * n_m_tiles * n_splits)
    p_plane = d_values + (i_split * n_own + i_own).to(tl.int64) * (1 if ONE_ROW else n_q) * n_k
    o_n = n_first + tl.arange(0, BLOCK_N)
    if ONE_ROW:
        tl.store(p_plane + o_n, tl.sum(b_d_values, 0).to(tl.float32), mask=o_n < n_k)
    else:
        o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        p_values = p_plane + o_m.to(tl.int64) * n_k + o_n[None, :]
        tl.store(p_values, b_d_values.to(tl.float32), mask=(o_m < n_q) & (o_n[None, :] < n_k))


@triton.jit(do_not_specialize=["n", "n_parts"])
def sum_parts_kernel(parts, out, n, n_parts, BLOCK: tl.constexpr):
    """`out = sum_i parts[i]`, of n entries each."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(n_parts):
        b_sum += tl.load(parts + o, mask=o < n, other=0.0)
        parts += n
    tl.store(out + o, b_sum.to(out.dtype.element_ty), mask=o < n)
