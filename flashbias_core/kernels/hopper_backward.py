"""What the two backward kernels of teams share: each keeps rows of one side, own ones, and those of the other pass by.

Own rows are those of queries, of the gradients of their outputs and of their factor columns, and passing ones those of
keys, of values and of theirs; or the other way round.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from .teams import batch_row, matrix, room_of, start_copy


@gluon.jit
def load(
    own, passing, own_rooms, rooms, ready, free, place,
    RANK: gl.constexpr, CHUNK: gl.constexpr, GRADIENT_RANK: gl.constexpr, DENSE: gl.constexpr, TEAMS: gl.constexpr,
    QUERIES: gl.constexpr,
):  # fmt: skip
    """The warp that loads: own rows for every team, then so many tiles of passing ones from row `begin` on.

    Behind their factor columns the passing ones may have others, with which gradients of a factor are made; or, in
    place of all columns, tiles of a dense bias. QUERIES: own rows are those of queries; keys pass by from the last on.
    """
    own_ready, rooms_ready = ready
    i_b, n_inner, i_h, i_own, i_passing, own_first, begin, n_tiles = place
    ROWS: gl.constexpr = TEAMS if DENSE else 1  # of the batch
    STAGES: gl.constexpr = rooms[0].shape[0] // ROWS
    OWN: gl.constexpr = own[0].block_shape[3]
    PASSING: gl.constexpr = passing[0].block_shape[3]
    COLUMNS: gl.constexpr = own[0].block_shape[4] + own[1].block_shape[4] + RANK
    i_o, i_i = batch_row(i_b, n_inner)
    for i_team in gl.static_range(TEAMS):
        first = own_first
        if DENSE:
            i_o, i_i = batch_row(i_b + i_team, n_inner)
        else:
            first += i_team * OWN
        mbarrier.expect(own_ready.index(i_team), OWN * COLUMNS * 2)  # bytes
        start_copy(own[0], i_o, i_i, i_own, first, 0, own_ready.index(i_team), own_rooms[0].index(i_team))
        start_copy(own[1], i_o, i_i, i_own, first, 0, own_ready.index(i_team), own_rooms[1].index(i_team))
        for i in gl.static_range(RANK // CHUNK):
            own_room = own_rooms[2].index(i_team * (RANK // CHUNK) + i)
            start_copy(own[2], i_o, i_i, i_h, first, i * CHUNK, own_ready.index(i_team), own_room)
    slot = 0
    phase = 1
    for i_tile in range(n_tiles):
        first = begin + ((n_tiles - 1 - i_tile) if QUERIES else i_tile) * PASSING
        mbarrier.wait(free.index(slot), phase)
        mbarrier.expect(rooms_ready.index(slot), PASSING * (ROWS * COLUMNS + GRADIENT_RANK + (OWN if DENSE else 0)) * 2)
        if DENSE:
            m_first, n_first = (own_first, first) if QUERIES else (first, own_first)
            start_copy(passing[2], 0, 0, i_h, m_first, n_first, rooms_ready.index(slot), rooms[2].index(slot))
        for i in gl.static_range(ROWS):
            if DENSE:
                i_o, i_i = batch_row(i_b + i, n_inner)
            room = slot * ROWS + i
            start_copy(passing[0], i_o, i_i, i_passing, first, 0, rooms_ready.index(slot), rooms[0].index(room))
            start_copy(passing[1], i_o, i_i, i_passing, first, 0, rooms_ready.index(slot), rooms[1].index(room))
        for i in gl.static_range(RANK // CHUNK):
            room = rooms[2].index(slot * (RANK // CHUNK) + i)
            start_copy(passing[2], i_o, i_i, i_h, first, i * CHUNK, rooms_ready.index(slot), room)
        if GRADIENT_RANK > 0:
            start_copy(passing[3], i_o, i_i, i_h, first, 0, rooms_ready.index(slot), rooms[3].index(slot))
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


@gluon.jit
def start_products(
    own_rooms, rooms, i_team, slot, b_zero, CHUNKS: gl.constexpr, DENSE: gl.constexpr, TEAMS: gl.constexpr
):
    """Start the scores of a tile, own rows by passing ones, and the products of values and gradients of outputs."""
    room = room_of(slot, i_team, TEAMS, DENSE)
    b_right = matrix(rooms[0], room).permute((1, 0))
    b_s = warpgroup_mma(matrix(own_rooms[0], i_team), b_right, b_zero, use_acc=False, is_async=True)
    for i in gl.static_range(CHUNKS):
        b_columns = matrix(rooms[2], slot * CHUNKS + i).permute((1, 0))
        b_s = warpgroup_mma(matrix(own_rooms[2], i_team * CHUNKS + i), b_columns, b_s, is_async=True)
    b_right = matrix(rooms[1], room).permute((1, 0))
    b_dp = warpgroup_mma(matrix(own_rooms[1], i_team), b_right, b_zero, use_acc=False, is_async=True)
    return b_s, b_dp
