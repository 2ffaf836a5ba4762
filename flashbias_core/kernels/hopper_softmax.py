"""The steps of a tile forward (`hopper.py`): its products with the queries, its weights, their sums."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from .teams import LOWEST, WARPS, floats, in_parts, matrix, room_of


@gluon.jit
def start_scores(rooms, i_team, slot, b_zero, TEAMS: gl.constexpr, CHUNKS: gl.constexpr, DENSE: gl.constexpr):
    """Start the products of a team's queries with as many keys of a tile as `b_zero` has, and of the factor columns."""
    b_k = matrix(rooms[1], room_of(slot, i_team, TEAMS, DENSE)).slice(0, b_zero.shape[1], 0).permute((1, 0))
    b_s = warpgroup_mma(matrix(rooms[0], i_team), b_k, b_zero, use_acc=False, is_async=True)
    if rooms[0].shape[0] > TEAMS:
        b_s = warpgroup_mma(matrix(rooms[0], TEAMS + i_team), b_k, b_s, is_async=True)
    for i in gl.static_range(CHUNKS):
        b_columns = matrix(rooms[4], slot * CHUNKS + i).permute((1, 0))
        b_s = warpgroup_mma(matrix(rooms[3], i_team * CHUNKS + i), b_columns, b_s, is_async=True)
    return b_s


@gluon.jit
def scale_queries(rooms, i_team, unit, TEAMS: gl.constexpr):
    """Multiply a team's queries by `unit`, without loss: into a high and a low half, beside the rooms of all teams."""
    high, low = matrix(rooms[0], i_team), matrix(rooms[0], TEAMS + i_team)
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (high.shape[1] // 8), high.shape[1] // 8], [WARPS, 1], [1, 0]
    )
    b_q = high.load(LAYOUT).to(gl.float32) * unit
    b_high = b_q.to(high.dtype)
    high.store(b_high)
    low.store((b_q - b_high.to(gl.float32)).to(high.dtype))
    fence_async_shared()


@gluon.jit
def softmax(
    b_s, b_bias, b_max, slope, ahead, b_steps, b_last, unit, to_log2,
    SLOPES: gl.constexpr, DENSE: gl.constexpr, CHECK: gl.constexpr, is_cut,
):  # fmt: skip
    """Weights of a tile, the new maximum of each row, and what sums over earlier tiles are to be multiplied by.

    `b_last` is how far into the tile a query attends: looked at where CHECK, and `is_cut`.
    """
    if DENSE:
        b_s = gl.fma(floats(b_bias), gl.full_like(b_s, 1 / unit), b_s)
    if SLOPES:
        b_s = gl.fma(gl.full_like(b_s, slope), b_steps + gl.zeros_like(b_s), b_s)
    if CHECK and is_cut:
        b_s = gl.where(b_steps <= b_last, b_s, float("-inf"))
    b_new = gl.maximum(b_max, gl.max(b_s, 1) + ahead if SLOPES else gl.max(b_s, 1))
    b_shift = b_new
    if CHECK or DENSE:
        b_shift = gl.maximum(b_new, LOWEST / gl.maximum(to_log2, 1.0))  # finite also times to_log2
    b_rescale = gl.exp2((b_max - b_shift) * to_log2)
    if SLOPES:
        b_shift -= ahead
    b_p = gl.exp2(b_s * to_log2 - gl.expand_dims(b_shift * to_log2, 1))
    return b_p, b_new, b_rescale


@gluon.jit
def sums(b_p, LAYOUT: gl.constexpr, IN_PARTS: gl.constexpr):
    """Sums of rows, or their parts."""
    if IN_PARTS:
        b_sum = in_parts(b_p, LAYOUT)
    else:
        b_sum = gl.convert_layout(gl.sum(b_p, 1), gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    return b_sum
