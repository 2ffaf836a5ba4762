"""What the warp that loads does forward (`hopper.py`): it copies tiles into rooms as teams give these back."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .teams import batch_row, following, part, start_copy


@gluon.jit
def task_at(i_task, tasks, BLOCK_M: gl.constexpr, TEAMS: gl.constexpr):
    """Row of the batch, head, key head and first query of a task with a dense bias."""
    n_q, n_heads, group, _ = tasks
    n_tiles = gl.cdiv(n_q, BLOCK_M)
    i_tile, i_b, i_h, i_kv = part(i_task, n_tiles, n_heads, group)
    return i_b * TEAMS, i_h, i_kv, (n_tiles - 1 - i_tile) * BLOCK_M


@gluon.jit
def load_task(
    tensors, rooms, ready, free, task, turn, RANK: gl.constexpr, CHUNK: gl.constexpr, DENSE: gl.constexpr,
    TEAMS: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Load queries for every team, then keys and values tile by tile, the last ones first; whose turn is next."""
    q, k, v = tensors[0], tensors[1], tensors[2]
    q_ready, k_ready, v_ready = ready
    q_free, k_free, v_free = free
    i_b, n_inner, i_h, i_kv, m_first, n_tiles = task
    slot, phase, q_phase = turn
    ROWS: gl.constexpr = TEAMS if DENSE else 1  # of the batch
    STAGES: gl.constexpr = rooms[1].shape[0] // ROWS
    BLOCK_M: gl.constexpr = q.block_shape[3]
    BLOCK_N: gl.constexpr = k.block_shape[3]
    COLUMNS: gl.constexpr = q.block_shape[4] + RANK
    i_o, i_i = batch_row(i_b, n_inner)
    for i_team in gl.static_range(TEAMS):
        first = m_first
        if DENSE:
            i_o, i_i = batch_row(i_b + i_team, n_inner)
        else:
            first += i_team * BLOCK_M
        if PERSISTENT:
            mbarrier.wait(q_free.index(i_team), q_phase ^ 1)
        mbarrier.expect(q_ready.index(i_team), BLOCK_M * COLUMNS * 2)  # bytes
        start_copy(q, i_o, i_i, i_h, first, 0, q_ready.index(i_team), rooms[0].index(i_team))
        for i in gl.static_range(RANK // CHUNK):
            room = rooms[3].index(i_team * (RANK // CHUNK) + i)
            start_copy(tensors[3], i_o, i_i, i_h, first, i * CHUNK, q_ready.index(i_team), room)
    for i_tile in range(n_tiles):
        first = (n_tiles - 1 - i_tile) * BLOCK_N
        mbarrier.wait(k_free.index(slot), phase ^ 1)
        mbarrier.expect(k_ready.index(slot), (ROWS * BLOCK_N * COLUMNS + (BLOCK_M * BLOCK_N if DENSE else 0)) * 2)
        if DENSE:
            start_copy(tensors[3], 0, 0, i_h, m_first, first, k_ready.index(slot), rooms[3].index(slot))
        for i in gl.static_range(ROWS):
            if DENSE:
                i_o, i_i = batch_row(i_b + i, n_inner)
            start_copy(k, i_o, i_i, i_kv, first, 0, k_ready.index(slot), rooms[1].index(slot * ROWS + i))
        for i in gl.static_range(RANK // CHUNK):
            k_room = rooms[4].index(slot * (RANK // CHUNK) + i)
            start_copy(tensors[4], i_o, i_i, i_h, first, i * CHUNK, k_ready.index(slot), k_room)
        mbarrier.wait(v_free.index(slot), phase ^ 1)
        mbarrier.expect(v_ready.index(slot), ROWS * BLOCK_N * v.block_shape[4] * 2)
        for i in gl.static_range(ROWS):
            if DENSE:
                i_o, i_i = batch_row(i_b + i, n_inner)
            start_copy(v, i_o, i_i, i_kv, first, 0, v_ready.index(slot), rooms[2].index(slot * ROWS + i))
        slot, phase = following(slot, phase, STAGES)
    return slot, phase, q_phase ^ 1


@gluon.jit
def load(
    tensors, rooms, ready, free, task, tasks, RANK: gl.constexpr, CHUNK: gl.constexpr, DENSE: gl.constexpr,
    TEAMS: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """The warp that loads, `task` or, PERSISTENT, all tasks of the program."""
    if PERSISTENT:
        n_inner, n_tiles, n_tasks = task[1], task[5], tasks[3]
        slot = 0
        phase = 0
        q_phase = 0
        for i_task in range(gl.program_id(0), n_tasks, gl.num_programs(0)):
            i_b, i_h, i_kv, m_first = task_at(i_task, tasks, tensors[0].block_shape[3], TEAMS)
            slot, phase, q_phase = load_task(
                tensors, rooms, ready, free, (i_b, n_inner, i_h, i_kv, m_first, n_tiles), (slot, phase, q_phase),
                RANK, CHUNK, DENSE, TEAMS, PERSISTENT,
            )  # fmt: skip
    else:
        load_task(tensors, rooms, ready, free, task, (0, 0, 0), RANK, CHUNK, DENSE, TEAMS, PERSISTENT)
