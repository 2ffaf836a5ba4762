"""Gradients of keys and values on Hopper, by teams of warps as in `hopper.py`.

What is computed is told in `backward.py`. A team keeps a tile of keys; while it turns the scores of one tile of queries
into their gradient, tensor cores add the tile before to the gradients of keys and values and form the next scores.
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
from .call import Call
from .hopper_backward import load, start_products
from .teams import (
    LOADER,
    LOG2_E,
    WARPS,
    barriers,
    batch_row,
    columns,
    floats,
    following,
    gradients,
    inputs,
    launch,
    load_bias,
    load_statistics,
    lost,
    matrix,
    minus,
    pack,
    program,
    rooms_for,
    slope_of,
    unpack,
)


@gluon.jit
def compute(
    own_rooms, rooms, ready, free, place, made, statistics, sizes,
    C: gl.constexpr, C_V: gl.constexpr, SLOPES: gl.constexpr, CAUSAL: gl.constexpr, CHUNKS: gl.constexpr,
    GRADIENT_RANK: gl.constexpr, SPLIT: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """The team: the gradients of its tile of keys and of their values."""
    own_ready, q_ready = ready
    i_bh, n_first, m_begin, n_tiles, p_slope = place
    d_key, d_value, d_columns = made
    level, delta = statistics
    n_q, n_k, offset, unit = sizes
    DTYPE: gl.constexpr = rooms[0].dtype
    BLOCK_M: gl.constexpr = rooms[0].shape[4]
    BLOCK_N: gl.constexpr = own_rooms[0].shape[4]
    STAGES: gl.constexpr = rooms[0].shape[0]
    # Products of the tile before, which are under way when scores are there.
    UNDER_WAY: gl.constexpr = 2 + (1 if GRADIENT_RANK > 0 else 0) + (1 if SPLIT else 0)
    WIDTH: gl.constexpr = rooms[0].shape[5]
    WIDTH_V: gl.constexpr = rooms[1].shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH_V, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, KEYS, 2)
    LEFT_V: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    # 16 columns stand for none.
    COLUMNS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, max(GRADIENT_RANK, 16), 16])
    LEFT_C: gl.constexpr = gl.DotOperandLayout(0, COLUMNS, 2)

    n_checked = 1
    if CAUSAL:  # tiles that the diagonal may cross
        n_checked = gl.maximum(gl.cdiv(gl.maximum(n_first + BLOCK_N - 1 - offset, 0) - m_begin, BLOCK_M), 1)
        n_checked = gl.minimum(n_checked, n_tiles)
    slope = 0.0
    if SLOPES:
        slope = gl.load(p_slope) * LOG2_E
    o_n = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(1, SCORES)), 1)
    o_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, SCORES))
    to_log2 = unit * LOG2_E
    b_zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SCORES)
    b_d_key = gl.zeros([BLOCK_N, WIDTH], gl.float32, KEYS)
    b_d_value = gl.zeros([BLOCK_N, WIDTH_V], gl.float32, VALUES)
    b_d_columns = gl.zeros([BLOCK_N, max(GRADIENT_RANK, 16)], gl.float32, COLUMNS)
    mbarrier.wait(own_ready.index(0), 0)

    slot = 0
    phase = 0
    b_level, b_delta = load_statistics(level, delta, i_bh, n_q, m_begin + o_m)
    mbarrier.wait(q_ready.index(0), 0)
    b_s, b_dp = start_products(own_rooms, rooms, 0, b_zero, CHUNKS)
    b_s, b_dp = warpgroup_mma_wait(0, [b_s, b_dp])
    b_bias = load_bias(rooms[2], 0, SCORES, True) if DENSE else 0
    b_p = probabilities(
        b_s, b_bias, b_level, slope, o_n, o_m, n_first - m_begin - offset, to_log2, SLOPES, DENSE, CAUSAL
    )
    b_dp = b_p * (b_dp - gl.expand_dims(b_delta, 0))
    b_ds = pack(b_dp, DTYPE)
    b_low = lost(b_dp, b_ds, DTYPE, SCORES) if SPLIT else b_ds
    b_pairs = pack(b_p, DTYPE)
    for part in gl.static_range(0 if CAUSAL else 1, 2):
        begin = 1 if part == 0 else n_checked
        end = n_checked if part == 0 else n_tiles
        for i_tile in range(begin, end):
            # The order matters, as in `hopper.compute_task`.
            m_first = m_begin + i_tile * BLOCK_M
            next_slot, next_phase = following(slot, phase, STAGES)
            b_level, b_delta = load_statistics(level, delta, i_bh, n_q, m_first + o_m)
            b_left = unpack(b_ds, DTYPE, LEFT)
            b_weights = unpack(b_pairs, DTYPE, LEFT_V)
            if GRADIENT_RANK > 0:
                b_left_c = unpack(b_ds, DTYPE, LEFT_C)
                b_left_low = unpack(b_low, DTYPE, LEFT_C)
            mbarrier.wait(q_ready.index(next_slot), next_phase)
            b_next, b_next_dp = start_products(own_rooms, rooms, next_slot, b_zero, CHUNKS)
            b_value_sums = warpgroup_mma(b_weights, matrix(rooms[1], slot), b_d_value, is_async=True)
            b_key_sums = warpgroup_mma(b_left, matrix(rooms[0], slot), b_d_key, is_async=True)
            if GRADIENT_RANK > 0:
                b_column_sums = warpgroup_mma(b_left_c, matrix(rooms[3], slot), b_d_columns, is_async=True)
                if SPLIT:
                    b_column_sums = warpgroup_mma(b_left_low, matrix(rooms[3], slot), b_column_sums, is_async=True)
            b_bias = load_bias(rooms[2], next_slot, SCORES, True) if DENSE else 0
            b_s, b_dp = warpgroup_mma_wait(UNDER_WAY, [b_next, b_next_dp])
            b_p = probabilities(
                b_s, b_bias, b_level, slope, o_n, o_m, n_first - m_first - offset, to_log2, SLOPES, DENSE,
                CAUSAL and part == 0,
            )  # fmt: skip
            b_dp = b_p * (b_dp - gl.expand_dims(b_delta, 0))
            if GRADIENT_RANK > 0:
                b_d_value, b_d_key, b_d_columns = warpgroup_mma_wait(0, [b_value_sums, b_key_sums, b_column_sums])
            else:
                b_d_value, b_d_key = warpgroup_mma_wait(0, [b_value_sums, b_key_sums])
            mbarrier.arrive(free.index(slot), count=1)
            b_ds = pack(b_dp, DTYPE)
            b_low = lost(b_dp, b_ds, DTYPE, SCORES) if SPLIT else b_ds
            b_pairs = pack(b_p, DTYPE)
            slot = next_slot
            phase = next_phase
    b_d_value = warpgroup_mma(unpack(b_pairs, DTYPE, LEFT_V), matrix(rooms[1], slot), b_d_value)
    b_d_key = warpgroup_mma(unpack(b_ds, DTYPE, LEFT), matrix(rooms[0], slot), b_d_key)

    if GRADIENT_RANK > 0:
        b_d_columns = warpgroup_mma(unpack(b_ds, DTYPE, LEFT_C), matrix(rooms[3], slot), b_d_columns)
        if SPLIT:
            b_d_columns = warpgroup_mma(unpack(b_low, DTYPE, LEFT_C), matrix(rooms[3], slot), b_d_columns)
        store(d_columns, b_d_columns, i_bh * n_k, n_first, n_k, GRADIENT_RANK, COLUMNS)
    store(d_key, b_d_key * unit, i_bh * n_k, n_first, n_k, C, KEYS)
    store(d_value, b_d_value, i_bh * n_k, n_first, n_k, C_V, VALUES)


@gluon.jit
def probabilities(
    b_s, b_bias, b_level, slope, o_n, o_m, distance, to_log2,
    SLOPES: gl.constexpr, DENSE: gl.constexpr, CHECK: gl.constexpr,
):  # fmt: skip
    """`exp(unit * s - LSE)` of a tile, keys by queries; `distance` is that of its first query to its first key."""
    if SLOPES:
        b_level -= slope * (gl.full_like(b_level, distance) - o_m.to(gl.float32))
        b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, to_log2), slope * o_n.to(gl.float32) + gl.zeros_like(b_s))
                      - gl.expand_dims(b_level, 0))  # fmt: skip
    elif DENSE:
        b_x = floats(b_bias) * LOG2_E + gl.expand_dims(minus(b_level), 0)
        b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, to_log2), b_x))
    else:
        b_p = gl.exp2(b_s * to_log2 + gl.expand_dims(minus(b_level), 0))
    if CHECK:
        b_p = gl.where(o_n + distance <= gl.expand_dims(o_m, 0), b_p, 0.0)
    return b_p


@gluon.jit
def store(out, b_x, row, first, n_rows, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    o_n = gl.expand_dims(first + gl.arange(0, b_x.shape[0], gl.SliceLayout(1, LAYOUT)), 1)
    o_c = gl.expand_dims(gl.arange(0, b_x.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    gl.store(out + (row + o_n) * COLUMNS + o_c, b_x.to(out.dtype.element_ty), mask=(o_n < n_rows) & (o_c < COLUMNS))


@gluon.jit(do_not_specialize=["n_q", "n_k", "n_inner", "n_heads", "group", "offset", "unit"])
def keys_teams_kernel(
    q, k, v, d_out, q_columns, k_columns, gradient_columns, bias, slopes, level, delta, d_key, d_value, d_columns,
    n_q, n_k, n_inner, n_heads, group, offset, unit,
    C: gl.constexpr, C_V: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr, CAUSAL: gl.constexpr,
    GRADIENT_RANK: gl.constexpr, SPLIT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TEAMS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of keys and values for each query head; what is read but for statistics are tensor descriptors."""
    gl.static_assert(TEAMS == 1)
    CHUNKS: gl.constexpr = RANK // CHUNK
    DENSE: gl.constexpr = bias is not None
    i_program, i_b, i_h, i_kv = program(gl.cdiv(n_k, BLOCK_N), n_heads, group)
    i_o, i_i = batch_row(i_b, n_inner)
    n_first = i_program * BLOCK_N
    m_begin = 0
    if CAUSAL:  # where nobody attends to these keys, the last tile still makes zeros
        m_begin = gl.minimum(gl.maximum(n_first - offset, 0) // BLOCK_M, gl.cdiv(n_q, BLOCK_M) - 1) * BLOCK_M
    n_tiles = gl.cdiv(n_q - m_begin, BLOCK_M)

    own, own_rooms = (k, v), (rooms_for(k, 1), rooms_for(v, 1))
    passing, rooms = (q, d_out), (rooms_for(q, STAGES), rooms_for(d_out, STAGES))
    if DENSE:
        passing, rooms = passing + (bias,), rooms + (rooms_for(bias, STAGES),)
    if RANK > 0:
        own, own_rooms = own + (k_columns,), own_rooms + (rooms_for(k_columns, CHUNKS),)
        passing, rooms = passing + (q_columns,), rooms + (rooms_for(q_columns, STAGES * CHUNKS),)
    if GRADIENT_RANK > 0:
        passing, rooms = passing + (gradient_columns,), rooms + (rooms_for(gradient_columns, STAGES),)
    ready = (barriers(1, 1), barriers(STAGES, 1))
    free = barriers(STAGES, 1)
    # Tuples that have a name lose what is constant in them.
    what = ((i_b * n_heads + i_h).to(gl.int64), n_first, m_begin, n_tiles, slope_of(slopes, level, i_o, i_i, i_h))
    made = (d_key, d_value, d_columns)
    rows = (level, delta)
    sizes = (n_q, n_k, offset, unit)
    where = (i_o, i_i, i_h, i_kv, i_h, n_first, m_begin, n_tiles)
    SLOPES: gl.constexpr = slopes is not None
    gl.warp_specialize([
        (compute, (own_rooms, rooms, ready, free, what, made, rows, sizes, C, C_V, SLOPES, CAUSAL, CHUNKS,
                   GRADIENT_RANK, SPLIT, DENSE)),
        (load, (own, passing, own_rooms, rooms, ready, free, where, RANK, CHUNK, GRADIENT_RANK, DENSE, False)),
    ], [1], [LOADER])  # fmt: skip


def backward(
    call: Call, tiles: Tiles, statistics: dict[str, Any], d_key: Tensor, d_value: Tensor, d_columns: Tensor | None,
    gradient_columns: terms.Block | None, split: bool,
) -> bool:  # fmt: skip
    """Write the gradients of keys, values and factor columns of a call that `plan.teams` gives to this kernel.

    False, with nothing written, where what is read lies in memory so that hardware cannot copy tiles of it.
    """
    rank = 0 if d_columns is None else d_columns.shape[-1]
    read = gradients(call, statistics["d_out"], gradient_columns, (tiles.block_m, tiles.block_m), rank)
    if read is None:
        return False
    made = {"slopes": call.terms.slopes, "level": statistics["level"], "delta": statistics["delta"]}
    made |= {"d_key": d_key, "d_value": d_value, "d_columns": d_key if d_columns is None else d_columns}
    programs = plan.team_programs(tiles, plan.cdiv(d_key.shape[-2], tiles.block_n), d_key.shape, call.frame.traits)
    launch(
        keys_teams_kernel, call, tiles, programs, inputs(call, tiles) | columns(call, tiles) | read, made,
        GRADIENT_RANK=rank, SPLIT=split,
    )  # fmt: skip
    return True
