"""What the two backward kernels of teams share: each keeps rows of one side, own ones, and those of the other pass by.

Own rows are those of queries, of the gradients of their outputs and of their factor columns, and passing ones those of
keys, of values and of theirs; or the other way round.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from .teams import following, matrix, start_copy


@gluon.jit
def load(
    own, passing, own_rooms, rooms, ready, free, place,
    RANK: gl.constexpr, CHUNK: gl.constexpr, GRADIENT_RANK: gl.constexpr, DENSE: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """The warp that loads: the team's own rows, then so many tiles of passing ones from row `begin` on.

    Behind their factor columns the passing ones may have others, with which gradients of a factor are made; or, in
    place of all columns, tiles of a dense bias. QUERIES: own rows are those of queries; keys pass by from the last on.
    """
    own_ready, rooms_ready = ready
    i_o, i_i, i_h, i_own, i_passing, own_first, begin, n_tiles = place
    STAGES: gl.constexpr = rooms[0].shape[0]
    OWN: gl.constexpr = own[0].block_shape[3]
    PASSING: gl.constexpr = passing[0].block_shape[3]
    COLUMNS: gl.constexpr = own[0].block_shape[4] + own[1].block_shape[4] + RANK
    bar = own_ready.index(0)
    mbarrier.expect(bar, OWN * COLUMNS * 2)  # bytes
    start_copy(own[0], i_o, i_i, i_own, own_first, 0, bar, own_rooms[0].index(0))
    start_copy(own[1], i_o, i_i, i_own, own_first, 0, bar, own_rooms[1].index(0))
    for i in gl.static_range(RANK // CHUNK):
        start_copy(own[2], i_o, i_i, i_h, own_first, i * CHUNK, bar, own_rooms[2].index(i))
    slot = 0
    phase = 1
    for i_tile in range(n_tiles):
        first = begin + ((n_tiles - 1 - i_tile) if QUERIES else i_tile) * PASSING
        bar = rooms_ready.index(slot)
        mbarrier.wait(free.index(slot), phase)
        mbarrier.expect(bar, PASSING * (COLUMNS + GRADIENT_RANK + (OWN if DENSE else 0)) * 2)
        if DENSE:
            m_first, n_first = (own_first, first) if QUERIES else (first, own_first)
            start_copy(passing[2], 0, 0, i_h, m_first, n_first, bar, rooms[2].index(slot))
        start_copy(passing[0], i_o, i_i, i_passing, first, 0, bar, rooms[0].index(slot))
        start_copy(passing[1], i_o, i_i, i_passing, first, 0, bar, rooms[1].index(slot))
        for i in gl.static_range(RANK // CHUNK):
            room = rooms[2].index(slot * (RANK // CHUNK) + i)
            start_copy(passing[2], i_o, i_i, i_h, first, i * CHUNK, bar, room)
        if GRADIENT_RANK > 0:
            start_copy(passing[3], i_o, i_i, i_h, first, 0, bar, rooms[3].index(slot))
        slot, phase = following(slot, phase, STAGES)


@gluon.jit
def start_products(own_rooms, rooms, slot, b_zero, CHUNKS: gl.constexpr):
    """Start the scores of a tile, own rows by passing ones, and the products of values and gradients of outputs.

    Passing rows are as many as `b_zero` has columns.
    """
    b_right = matrix(rooms[0], slot).slice(0, b_zero.shape[1], 0).permute((1, 0))
    b_s = warpgroup_mma(matrix(own_rooms[0], 0), b_right, b_zero, use_acc=False, is_async=True)
    for i in gl.static_range(CHUNKS):
        b_columns = matrix(rooms[2], slot * CHUNKS + i).permute((1, 0))
        b_s = warpgroup_mma(matrix(own_rooms[2], i), b_columns, b_s, is_async=True)
    b_right = matrix(rooms[1], slot).slice(0, b_zero.shape[1], 0).permute((1, 0))
    b_dp = warpgroup_mma(matrix(own_rooms[1], 0), b_right, b_zero, use_acc=False, is_async=True)
    return b_s, b_dp
