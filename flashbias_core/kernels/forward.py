"""Attention, forward: one program for each tile of queries, walking over the keys with a running softmax.

Where the queries are too few to fill the device, several programs share a tile's keys; `combine_kernel` joins them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import NOT_SPECIALIZED, whole_unit
from .terms import (
    LOG2_E,
    LOWEST,
    add_distances,
    add_matrix,
    add_scaled,
    add_table,
    diagonal,
    exponential,
    key_range,
    load_chunk,
    load_item,
    load_matrix,
    load_rows,
    mask_scores,
    over,
    products,
    program,
    row_place,
    steps,
)


@triton.jit(do_not_specialize=["n_splits", *NOT_SPECIALIZED])
def forward_kernel(
    q, k, v, out, lse, terms, masks, tiles, unit_rest,
    n_splits, n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: tl.constexpr, C_V: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, FOLDED: tl.constexpr,
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    ABREAST: tl.constexpr, LONG: tl.constexpr, IN_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and LSE; with IN_PARTS those of one of `n_splits` parts of the keys, each in a plane of its own.

    With `unit_rest`, what fp32 leaves of the unit, scores, probabilities and their sums are formed in float64.
    """
    DTYPE: tl.constexpr = tl.float32 if unit_rest is None else tl.float64
    unit = whole_unit(unit, unit_rest)
    n_tiles = tl.cdiv(n_q, BLOCK_M)
    i_tile, i_bh, i_o, i_i, i_h, i_kv = program(n_tiles, n_inner, n_heads, group)
    m_first = (n_tiles - 1 - i_tile) * BLOCK_M  # under a causal mask the longest first
    o_m = (m_first + tl.arange(0, BLOCK_M))[:, None]
    offset = diagonal(masks, i_o, i_i, offset)
    n_keys, whole, end = key_range(masks, i_o, i_i, m_first, n_k, offset, CAUSAL, BLOCK_M, BLOCK_N)
    EXACT: tl.constexpr = v.ptr.dtype.element_ty == tl.float32
    if EXACT:  # in one loop, as the queries' kernel has it
        whole = 0
    begin = 0
    if IN_PARTS:
        part = tl.cdiv(tl.cdiv(end, BLOCK_N), n_splits) * BLOCK_N
        begin = tl.program_id(1) * part
        end = tl.minimum(end, begin + part)
        whole = tl.maximum(tl.minimum(whole, end // BLOCK_N * BLOCK_N), begin)
    # Softmax does not see what is constant along a row: where nothing but the keys' order counts, distances are those
    # to the tile's first row, and the part that a tile's entries have in common is not added to each of them.
    FAR: tl.constexpr = (terms.slopes is not None and terms.q_positions is None) and not SYMMETRIC
    b_max = tl.full([BLOCK_M], float("-inf"), DTYPE)
    slope = 0.0
    ahead = tl.full([], 0.0, DTYPE)
    if FAR:
        slope = over(load_item(terms.slopes, i_o, i_i, i_h), unit, b_max)

    b_q = load_rows(q, i_o, i_i, i_h, m_first, n_q, BLOCK_M, C, WIDTH, True)
    b_q_columns = b_q
    if RANK > 0 and RANK == CHUNK:
        b_q_columns = load_chunk(terms.q_columns, 0, i_o, i_i, i_h, m_first, n_q, BLOCK_M, CHUNK, True)
    b_sum = tl.zeros([BLOCK_M], DTYPE)
    b_out = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    to_log2 = unit * LOG2_E
    lowest = LOWEST / tl.maximum(to_log2, 1.0)  # finite also times to_log2

    for phase in tl.static_range(1 if EXACT else 0, 2):
        first = whole if phase == 1 else begin
        last = end if phase == 1 else whole
        # A loop that is not entered would have started to load. Long rows do not feel it, and run out of registers.
        if LONG or first < last:
            for n_first in tl.range(first, last, BLOCK_N):
                o_n = (n_first + tl.arange(0, BLOCK_N))[None, :]
                b_k = load_rows(k, i_o, i_i, i_kv, n_first, n_keys, BLOCK_N, C, WIDTH, phase == 1)
                b_s = products(
                    b_q, b_k, q, k, b_q_columns, terms.q_columns, terms.k_columns, i_o, i_i, i_h, i_h, i_kv,
                    m_first, n_first, n_q, n_keys, unit, BLOCK_M, BLOCK_N, C, RANK, CHUNK, FOLDED, PRECISION,
                    SUMS, phase == 1, DTYPE,
                )  # fmt: skip
                if FAR:
                    b_s = add_scaled(b_s, slope, steps(BLOCK_N, True))
                    ahead = slope * (n_first - m_first - offset).to(DTYPE)
                else:
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

                b_new = tl.maximum(b_max, tl.max(b_s, 1) + ahead)
                b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if EXACT else tl.maximum(b_new, lowest)
                # Exactly 1 while the maximum stays: anything else would be raised to the number of tiles.
                b_rescale = exponential(b_max - b_shift, unit, EXACT)
                b_shift -= ahead
                if EXACT:
                    b_p = exponential(b_s - b_shift[:, None], unit, True)
                else:  # one instruction less, and an error of the last bit of the maximum
                    b_p = tl.exp2(b_s * to_log2 - (b_shift * to_log2)[:, None])
                b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
                b_v = load_rows(v, i_o, i_i, i_kv, n_first, n_keys, BLOCK_N, C_V, WIDTH_V, phase == 1)
                if EXACT:
                    # Added outside of the product: tensor cores truncate what they accumulate, too much in the end.
                    b_pv = tl.dot(b_p.to(tl.float32), b_v, input_precision=PRECISION)  # [M, N] @ [N, Cv]
                    b_out = tl.fma(b_out, b_rescale.to(tl.float32)[:, None].broadcast_to(BLOCK_M, WIDTH_V), b_pv)
                else:
                    b_out = b_out * b_rescale[:, None]
                    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out)  # [M, N] @ [N, Cv]
                b_max = b_new

    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max * unit + tl.log(b_sum))
    if FAR:  # the LSE is that of the true bias
        b_lse -= slope * unit * tl.arange(0, BLOCK_M)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum).to(tl.float32)[:, None]
    b_out = tl.div_rn(b_out, b_sum.broadcast_to(BLOCK_M, WIDTH_V)) if EXACT else b_out / b_sum

    if IN_PARTS:
        i_bh += tl.program_id(1) * (tl.num_programs(0) // n_tiles).to(tl.int64)
    o_row = m_first + tl.arange(0, BLOCK_M)
    tl.store(lse + i_bh * n_q + o_row, b_lse, mask=o_row < n_q)
    o_c = tl.arange(0, WIDTH_V)[None, :]
    p_out = out + row_place(i_bh, o_m, n_q, n_heads, ABREAST and not IN_PARTS) * C_V + o_c
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=(o_m < n_q) & (o_c < C_V))


@triton.jit(do_not_specialize=["n_splits", "n_q", "n_heads"])
def combine_kernel(
    out_parts, lse_parts, out, lse, n_splits, n_q, n_heads,
    C_V: tl.constexpr, WIDTH_V: tl.constexpr, ABREAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and LSE of a row from those of the parts of its keys, `(n_splits, rows, Cv)` and `(n_splits, rows)`.

    LSEs of parts are in float64 where scores were.
    """
    i_row, n_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_part = tl.arange(0, BLOCK)
    o_c = tl.arange(0, WIDTH_V)
    b_lse = tl.load(lse_parts + o_part * n_rows + i_row, mask=o_part < n_splits, other=float("-inf"))
    largest = tl.max(b_lse, 0)
    b_weight = tl.exp(b_lse - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(b_weight, 0)
    p_out = out_parts + (o_part[:, None] * n_rows + i_row) * C_V + o_c[None, :]
    b_out = tl.load(p_out, mask=(o_part[:, None] < n_splits) & (o_c[None, :] < C_V), other=0.0)
    b_out = over(tl.sum(b_out * b_weight[:, None], 0), tl.where(total == 0.0, 1.0, total), b_lse)
    tl.store(lse + i_row, tl.where(total == 0.0, float("-inf"), largest + tl.log(total)))
    p_out = out + row_place(i_row // n_q, i_row % n_q, n_q, n_heads, ABREAST) * C_V + o_c
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=o_c < C_V)
