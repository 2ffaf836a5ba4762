"""Gradients of queries, of their factor columns and of slopes on Hopper, by teams of warps as in `hopper.py`.

What is computed is told in `backward.py`. A team keeps a tile of queries; while it turns the scores of one tile of keys
into their gradient, tensor cores add the tile before to its sums and form the next scores.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from flashbias import plan
from flashbias.tiles import Tiles

from . import terms
from .backward import Forward
from .call import Call
from .hopper_backward import load, start_products
from .teams import (
    LOADER,
    LOG2_E,
    LOWEST,
    PITCH,
    WARPS,
    barriers,
    batch_row,
    columns,
    floats,
    following,
    gradients,
    in_parts,
    inputs,
    launch,
    load_bias,
    lost,
    matrix,
    pack,
    pitch,
    program,
    rooms_for,
    row_place,
    slope_of,
    steps,
    unpack,
)


@gluon.jit
def probabilities(
    b_s, b_bias, b_level, slope, ahead, b_steps, n_first, o_last, to_log2,
    SLOPES: gl.constexpr, DENSE: gl.constexpr, CHECK: gl.constexpr,
):  # fmt: skip
    """`exp(unit * s - LSE)` of a tile; `ahead` is slope times the distance of each query to the tile's first key."""
    if SLOPES:
        b_x = gl.fma(b_s, gl.full_like(b_s, to_log2), slope * b_steps + gl.zeros_like(b_s))
        b_p = gl.exp2(b_x - gl.expand_dims(b_level - ahead, 1))
    elif DENSE:
        b_x = floats(b_bias) * LOG2_E - gl.expand_dims(b_level, 1)
        b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, to_log2), b_x))
    else:
        b_p = gl.exp2(b_s * to_log2 - gl.expand_dims(b_level, 1))
    if CHECK:
        b_p = gl.where(b_steps <= (o_last - n_first), b_p, 0.0)
    return b_p


@gluon.jit
def add_rows(
    b_excess, b_d_slopes, b_mean_distance, b_p, b_ds, b_steps, b_first,
    EXCESS: gl.constexpr, D_SLOPES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """A tile's rows added to parts of their sums of dS, and of dS and P times distances. Slopes have EXCESS, too."""
    if EXCESS:
        b_excess += in_parts(b_ds, SUMS)
    if D_SLOPES:
        b_distance = b_steps + gl.expand_dims(b_first, 1)
        b_d_slopes += in_parts(b_ds * b_distance, SUMS)
        b_mean_distance += in_parts(b_p * b_distance, SUMS)
    return b_excess, b_d_slopes, b_mean_distance


@gluon.jit
def row_sums(b_parts, ROWS: gl.constexpr):
    return gl.convert_layout(gl.sum(b_parts, 1), ROWS, assert_trivial=True)


@gluon.jit
def statistics_of(
    d_out_rooms, forward, i_bh, m_first, o_row, n_q, n_heads,
    C_V: gl.constexpr, ABREAST: gl.constexpr, D_LSE: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Level and delta of a tile's queries, as `backward.delta_kernel` has them."""
    out, lse, d_lse = forward
    WIDTH_V: gl.constexpr = d_out_rooms.shape[5]
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH_V, 16])
    o_m = gl.expand_dims(gl.arange(0, d_out_rooms.shape[4], gl.SliceLayout(1, VALUES)), 1)
    o_c = gl.expand_dims(gl.arange(0, WIDTH_V, gl.SliceLayout(0, VALUES)), 0)
    p_out = out + row_place(i_bh, m_first + o_m, n_q, n_heads, ABREAST) * C_V + o_c
    b_out = gl.load(p_out, mask=(m_first + o_m < n_q) & (o_c < C_V), other=0.0)
    b_d_out = matrix(d_out_rooms, 0).load(VALUES)
    b_delta = gl.sum(b_d_out.to(gl.float32) * b_out.to(gl.float32), 1)
    b_delta = gl.convert_layout(b_delta, ROWS, assert_trivial=True)
    if D_LSE:
        b_delta -= gl.load(d_lse + i_bh * n_q + m_first + o_row, mask=m_first + o_row < n_q, other=0.0)
    b_lse = gl.load(lse + i_bh * n_q + m_first + o_row, mask=m_first + o_row < n_q, other=float("-inf"))
    b_level = gl.where(b_lse * LOG2_E == float("-inf"), LOWEST, b_lse * LOG2_E)
    return gl.where(b_lse == float("-inf"), float("inf"), b_level), b_delta


@gluon.jit
def compute(
    own_rooms, rooms, ready, free, place, forward, made, statistics, sizes,
    C: gl.constexpr, C_V: gl.constexpr, SLOPES: gl.constexpr, CAUSAL: gl.constexpr, CHUNKS: gl.constexpr,
    GRADIENT_RANK: gl.constexpr, SPLIT: gl.constexpr, EXCESS: gl.constexpr, D_SLOPES: gl.constexpr,
    D_LSE: gl.constexpr, ABREAST: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """The team: the statistics and gradients of its tile of queries."""
    own_ready, k_ready = ready
    i_bh, m_first, n_tiles, p_slope = place
    d_query, d_columns, d_slopes = made
    level, delta = statistics
    n_q, n_k, n_heads, offset, unit = sizes
    DTYPE: gl.constexpr = own_rooms[0].dtype
    BLOCK_M: gl.constexpr = own_rooms[0].shape[4]
    BLOCK_N: gl.constexpr = rooms[0].shape[4]
    STAGES: gl.constexpr = rooms[0].shape[0]
    MEANS: gl.constexpr = EXCESS and GRADIENT_RANK > 0
    # Products of the tile before, which are under way when scores are there.
    UNDER_WAY: gl.constexpr = 1 + (1 if GRADIENT_RANK > 0 else 0) + (1 if SPLIT else 0) + (1 if MEANS else 0)
    WIDTH: gl.constexpr = rooms[0].shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    QUERIES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, QUERIES, 2)
    # 16 columns stand for none.
    COLUMNS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, max(GRADIENT_RANK, 16), 16])
    LEFT_C: gl.constexpr = gl.DotOperandLayout(0, COLUMNS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 16])

    i_row = i_bh * n_q + m_first
    o_row = gl.arange(0, BLOCK_M, ROWS)
    inside = m_first + o_row < n_q
    mbarrier.wait(own_ready.index(0), 0)
    b_level, b_delta = statistics_of(
        own_rooms[1], forward, i_bh, m_first, o_row, n_q, n_heads, C_V, ABREAST, D_LSE, ROWS
    )
    o_place = i_bh * pitch(n_q) + m_first + o_row
    gl.store(level + o_place, b_level)
    if not EXCESS:
        gl.store(delta + o_place, b_delta)
    n_whole = n_k // BLOCK_N  # tiles in which nothing needs to be checked
    o_last = n_k - 1
    if CAUSAL:
        n_whole = gl.maximum(gl.minimum(n_k, m_first + offset + 1), 0) // BLOCK_N
        o_last = gl.expand_dims(gl.minimum(o_last, m_first + o_row + offset), 1)
    n_checked = gl.minimum(gl.maximum(n_tiles - n_whole, 1), n_tiles)
    slope = 0.0
    if SLOPES:
        slope = gl.load(p_slope) * LOG2_E
    b_steps = steps(BLOCK_N, SCORES, SLOPES)
    to_log2 = unit * LOG2_E
    b_zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    b_d_query = gl.zeros([BLOCK_M, WIDTH], gl.float32, QUERIES)
    b_d_columns = gl.zeros([BLOCK_M, max(GRADIENT_RANK, 16)], gl.float32, COLUMNS)
    b_means = gl.zeros([BLOCK_M, max(GRADIENT_RANK, 16)], gl.float32, COLUMNS)
    b_excess = gl.zeros([BLOCK_M, 8], gl.float32, SUMS)
    b_d_slopes = b_excess
    b_mean_distance = b_excess

    # The last tile comes first, as in `hopper.compute_task`.
    n_first = (n_tiles - 1) * BLOCK_N
    mbarrier.wait(k_ready.index(0), 0)
    b_s, b_dp = start_products(own_rooms, rooms, 0, b_zero, CHUNKS)
    b_bias = load_bias(rooms[2], 0, SCORES, False) if DENSE else 0
    b_s, b_dp = warpgroup_mma_wait(0, [b_s, b_dp])
    b_first = (n_first - m_first - offset - o_row).to(gl.float32)  # distances to the tile's first key
    b_p = probabilities(
        b_s, b_bias, b_level, slope, slope * b_first, b_steps, n_first, o_last, to_log2, SLOPES, DENSE, True
    )
    b_dp = b_p * (b_dp - gl.expand_dims(b_delta, 1))
    b_excess, b_d_slopes, b_mean_distance = add_rows(
        b_excess, b_d_slopes, b_mean_distance, b_p, b_dp, b_steps, b_first, EXCESS, D_SLOPES, SUMS
    )
    b_ds = pack(b_dp, DTYPE)
    b_low = lost(b_dp, b_ds, DTYPE, SCORES) if SPLIT else b_ds
    b_pairs = pack(b_p, DTYPE) if MEANS else b_ds

    slot = 0
    phase = 0
    for part in gl.static_range(0 if CAUSAL else 1, 2):
        begin = 1 if part == 0 else n_checked
        end = n_checked if part == 0 else n_tiles
        for i_tile in range(begin, end):
            # The order matters, as in `hopper.compute_task`.
            n_first = (n_tiles - 1 - i_tile) * BLOCK_N
            next_slot, next_phase = following(slot, phase, STAGES)
            b_left = unpack(b_ds, DTYPE, LEFT)
            if GRADIENT_RANK > 0:
                b_left_c = unpack(b_ds, DTYPE, LEFT_C)
                b_left_low = unpack(b_low, DTYPE, LEFT_C)
                b_weights = unpack(b_pairs, DTYPE, LEFT_C)
            mbarrier.wait(k_ready.index(next_slot), next_phase)
            b_next, b_next_dp = start_products(own_rooms, rooms, next_slot, b_zero, CHUNKS)
            b_sums = warpgroup_mma(b_left, matrix(rooms[0], slot), b_d_query, is_async=True)
            if GRADIENT_RANK > 0:
                b_column_sums = warpgroup_mma(b_left_c, matrix(rooms[3], slot), b_d_columns, is_async=True)
                if SPLIT:
                    b_column_sums = warpgroup_mma(b_left_low, matrix(rooms[3], slot), b_column_sums, is_async=True)
            if MEANS:
                b_mean_sums = warpgroup_mma(b_weights, matrix(rooms[3], slot), b_means, is_async=True)
            b_bias = load_bias(rooms[2], next_slot, SCORES, False) if DENSE else 0
            b_s, b_dp = warpgroup_mma_wait(UNDER_WAY, [b_next, b_next_dp])
            b_first = (n_first - m_first - offset - o_row).to(gl.float32)
            b_p = probabilities(
                b_s, b_bias, b_level, slope, slope * b_first, b_steps, n_first, o_last, to_log2, SLOPES, DENSE,
                part == 0,
            )  # fmt: skip
            b_dp = b_p * (b_dp - gl.expand_dims(b_delta, 1))
            b_excess, b_d_slopes, b_mean_distance = add_rows(
                b_excess, b_d_slopes, b_mean_distance, b_p, b_dp, b_steps, b_first, EXCESS, D_SLOPES, SUMS
            )
            if MEANS:
                b_d_query, b_d_columns, b_means = warpgroup_mma_wait(0, [b_sums, b_column_sums, b_mean_sums])
            elif GRADIENT_RANK > 0:
                b_d_query, b_d_columns = warpgroup_mma_wait(0, [b_sums, b_column_sums])
            else:
                b_d_query = warpgroup_mma_wait(0, [b_sums])
            mbarrier.arrive(free.index(slot), count=1)
            b_ds = pack(b_dp, DTYPE)
            b_low = lost(b_dp, b_ds, DTYPE, SCORES) if SPLIT else b_ds
            b_pairs = pack(b_p, DTYPE) if MEANS else b_ds
            slot = next_slot
            phase = next_phase
    b_d_query = warpgroup_mma(unpack(b_ds, DTYPE, LEFT), matrix(rooms[0], slot), b_d_query)
    if GRADIENT_RANK > 0:
        b_d_columns = warpgroup_mma(unpack(b_ds, DTYPE, LEFT_C), matrix(rooms[3], slot), b_d_columns)
        if SPLIT:
            b_d_columns = warpgroup_mma(unpack(b_low, DTYPE, LEFT_C), matrix(rooms[3], slot), b_d_columns)
    if MEANS:
        b_means = warpgroup_mma(unpack(b_pairs, DTYPE, LEFT_C), matrix(rooms[3], slot), b_means)

    b_excess = row_sums(b_excess, ROWS)
    # What the sum of a row's dS lacks. It is added: where the means, which products have made, were subtracted, ptxas
    # took them for the zeros that they had been before.
    b_lack = gl.zeros_like(b_excess) - b_excess
    if EXCESS:
        if D_LSE:
            b_lack += gl.load(forward[2] + i_row + o_row, mask=inside, other=0.0)
        gl.store(delta + o_place, b_delta - b_lack)
    if D_SLOPES:
        b_d_slopes = row_sums(b_d_slopes, ROWS) + b_lack * row_sums(b_mean_distance, ROWS)
        gl.store(d_slopes + i_row + o_row, b_d_slopes, mask=inside)
    if GRADIENT_RANK > 0:
        if MEANS:
            b_lack = gl.convert_layout(b_lack, gl.SliceLayout(1, COLUMNS), assert_trivial=True)
            b_d_columns += gl.expand_dims(b_lack, 1) * b_means
        o_m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(1, COLUMNS)), 1)
        o_r = gl.expand_dims(gl.arange(0, GRADIENT_RANK, gl.SliceLayout(0, COLUMNS)), 0)
        gl.store(d_columns + (i_row + o_m) * GRADIENT_RANK + o_r, b_d_columns, mask=m_first + o_m < n_q)
    o_m = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(1, QUERIES)), 1)
    o_c = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, QUERIES)), 0)
    b_d_query = (b_d_query * unit).to(d_query.dtype.element_ty)
    gl.store(d_query + (i_row + o_m) * C + o_c, b_d_query, mask=(m_first + o_m < n_q) & (o_c < C))


@gluon.jit(do_not_specialize=["n_q", "n_k", "n_inner", "n_heads", "group", "offset", "unit"])
def queries_teams_kernel(
    q, k, v, d_out, q_columns, k_columns, gradient_columns, bias, slopes, out, lse, d_lse, level, delta,
    d_query, d_columns, d_slopes, n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: gl.constexpr, C_V: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr, CAUSAL: gl.constexpr,
    GRADIENT_RANK: gl.constexpr, SPLIT: gl.constexpr, EXCESS: gl.constexpr, D_SLOPES: gl.constexpr,
    D_LSE: gl.constexpr, ABREAST: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TEAMS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Statistics of queries, which the other kernels read, and gradients of queries, their factor columns and slopes.

    What is read in tiles of features or columns, but for the output, are tensor descriptors.
    """
    gl.static_assert(TEAMS == 1 and PITCH % BLOCK_M == 0)
    CHUNKS: gl.constexpr = RANK // CHUNK
    DENSE: gl.constexpr = bias is not None
    n_programs = gl.cdiv(n_q, BLOCK_M)
    i_program, i_b, i_h, i_kv = program(n_programs, n_heads, group)
    i_o, i_i = batch_row(i_b, n_inner)
    m_first = (n_programs - 1 - i_program) * BLOCK_M  # the longest first, if causal
    n_end = n_k
    if CAUSAL:
        n_end = gl.minimum(n_k, m_first + BLOCK_M + offset)
    n_tiles = gl.maximum(gl.cdiv(n_end, BLOCK_N), 1)  # a tile that nobody attends to still makes zeros

    own, own_rooms = (q, d_out), (rooms_for(q, 1), rooms_for(d_out, 1))
    passing, rooms = (k, v), (rooms_for(k, STAGES), rooms_for(v, STAGES))
    if DENSE:
        passing, rooms = passing + (bias,), rooms + (rooms_for(bias, STAGES),)
    if RANK > 0:
        own, own_rooms = own + (q_columns,), own_rooms + (rooms_for(q_columns, CHUNKS),)
        passing, rooms = passing + (k_columns,), rooms + (rooms_for(k_columns, STAGES * CHUNKS),)
    if GRADIENT_RANK > 0:
        passing, rooms = passing + (gradient_columns,), rooms + (rooms_for(gradient_columns, STAGES),)
    ready = (barriers(1, 1), barriers(STAGES, 1))
    free = barriers(STAGES, 1)
    # Tuples that have a name lose what is constant in them.
    what = ((i_b * n_heads + i_h).to(gl.int64), m_first, n_tiles, slope_of(slopes, level, i_o, i_i, i_h))
    forward = (out, lse, d_lse)
    made = (d_query, d_columns, d_slopes)
    rows = (level, delta)
    sizes = (n_q, n_k, n_heads, offset, unit)
    where = (i_o, i_i, i_h, i_h, i_kv, m_first, 0, n_tiles)
    SLOPES: gl.constexpr = slopes is not None
    gl.warp_specialize([
        (compute, (own_rooms, rooms, ready, free, what, forward, made, rows, sizes, C, C_V, SLOPES, CAUSAL, CHUNKS,
                   GRADIENT_RANK, SPLIT, EXCESS, D_SLOPES, D_LSE, ABREAST, DENSE)),
        (load, (own, passing, own_rooms, rooms, ready, free, where, RANK, CHUNK, GRADIENT_RANK, DENSE, True)),
    ], [1], [LOADER])  # fmt: skip


def backward(
    call: Call, tiles: Tiles, statistics: dict[str, Any], forward: Forward, d_query: Tensor,
    d_slopes: Tensor | None, d_columns: Tensor | None, gradient_columns: terms.Block | None, split: bool, excess: bool,
) -> bool:  # fmt: skip
    """Write the gradients of queries, slopes and factor columns of a call that `plan.teams` gives to this kernel.

    It makes the statistics, too. False, with nothing written, where what is read lies in memory so that hardware cannot
    copy tiles of it.
    """
    rank = 0 if d_columns is None else d_columns.shape[-1]
    read = gradients(call, statistics["d_out"], gradient_columns, (tiles.block_m, tiles.block_n), rank)
    if read is None:
        return False
    level = statistics["level"]
    given = {"d_lse": forward.d_lse, "d_columns": d_columns, "d_slopes": d_slopes}
    made = {"slopes": call.terms.slopes, "out": forward.out, "lse": forward.lse}
    made |= {"level": level, "delta": statistics["delta"], "d_query": d_query}
    made |= {name: level if tensor is None else tensor for name, tensor in given.items()}  # one that is not looked at
    n_tiles = plan.cdiv(d_query.shape[-2], tiles.block_m)
    programs = plan.team_programs(tiles, n_tiles, d_query.shape, call.frame.traits)
    launch(
        queries_teams_kernel, call, tiles, programs, inputs(call, tiles) | columns(call, tiles) | read, made,
        GRADIENT_RANK=rank, SPLIT=split, EXCESS=excess, D_SLOPES=d_slopes is not None, D_LSE=forward.d_lse is not None,
        ABREAST=forward.abreast,
    )  # fmt: skip
    return True
