"""Gradient of a table by distance, near its distances: what lies beyond its reach is summed by the queries' kernel.

Queries come in bands of BAND rows. For each the keys near the table's distances are as many columns, at the same place
relative to the band (`near_keys`): laid on each other, all bands of all batches and heads that share a table add up to
one `[BAND, width]` matrix, whose diagonals are the table's distances.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import NOT_SPECIALIZED, whole_unit
from .terms import BAND, diagonal, load_matrix, near_keys
from .values import member, tile_gradient


@triton.jit(do_not_specialize=[
    *NOT_SPECIALIZED, "n_outer_shared", "n_inner_shared", "n_heads_shared", "n_splits", "start", "width",
])  # fmt: skip
def table_kernel(
    q, k, v, d_out, level, delta, low, d_bands, terms, masks, tiles,
    n_outer_shared, n_inner_shared, n_heads_shared, n_splits, start, width, unit_rest,
    n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: tl.constexpr, C_V: tl.constexpr, RANK: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CHUNK: tl.constexpr, FOLDED: tl.constexpr,
    CAUSAL: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS near the table's distances, `[BAND, width]` from column `start` on, summed over bands and shared members.

    A program sums one of `n_splits` parts of them for one tile. Offsets in a tensor are never shared. With
    `unit_rest` all is in float64, as the queries' kernel has it.
    """
    DTYPE: tl.constexpr = tl.float32 if unit_rest is None else tl.float64
    unit = whole_unit(unit, unit_rest)
    n_m, n_n = BAND // BLOCK_M, width // BLOCK_N
    i_n = tl.program_id(0) % n_n
    i_rest = tl.program_id(0) // n_n
    i_m, i_rest = i_rest % n_m, i_rest // n_m
    i_split, i_own = i_rest % n_splits, i_rest // n_splits
    o_o, o_i, _ = member(i_own, 0, n_inner_shared, n_heads_shared, n_inner, n_heads)
    first_row = i_m * BLOCK_M
    first_column, near_end = near_keys(n_q, 0, terms.reach, diagonal(masks, o_o, o_i, offset))
    first_column += start + i_n * BLOCK_N

    # Bands [begin, end) have queries and keys there.
    begin = tl.cdiv(tl.maximum(-first_column, 0), BAND)
    end = tl.minimum(tl.cdiv(tl.maximum(n_q - first_row, 0), BAND), tl.cdiv(tl.maximum(n_k - first_column, 0), BAND))
    end = tl.where(first_column < near_end, end, 0)
    n_bands = tl.maximum(end - begin, 0)
    n_members = n_outer_shared * n_inner_shared * n_heads_shared * n_bands
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], DTYPE)
    for i_member in tl.range(n_members * i_split // n_splits, n_members * (i_split + 1) // n_splits):
        band = (begin + i_member % n_bands) * BAND
        i_o, i_i, i_h = member(i_own, i_member // n_bands, n_inner_shared, n_heads_shared, n_inner, n_heads)
        m_first, n_first = band + first_row, band + first_column
        b_matrix = load_matrix(
            terms, tiles, i_o, i_i, i_h, (m_first + tl.arange(0, BLOCK_M))[:, None],
            (n_first + tl.arange(0, BLOCK_N))[None, :], m_first, n_first, n_q, n_k, True, True,
        )  # fmt: skip
        b_sum += tile_gradient(
            q, k, v, d_out, level, delta, low, terms, masks, b_matrix, i_o, i_i, i_h, m_first, n_first,
            n_q, n_k, n_inner, n_heads, group, offset, unit,
            C, C_V, RANK, WIDTH, WIDTH_V, CHUNK, FOLDED, CAUSAL, SYMMETRIC, PRECISION, SUMS, BLOCK_M, BLOCK_N,
            DTYPE,
        )  # fmt: skip

    n_own = tl.num_programs(0) // (n_n * n_m * n_splits)
    o_m = (first_row + tl.arange(0, BLOCK_M))[:, None]
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    p_band = d_bands + (i_split * n_own + i_own).to(tl.int64) * BAND * width
    tl.store(p_band + o_m * width + o_n, b_sum)
