"""Attention, forward, on Hopper: one warp loads, teams of four warps compute, each for a tile of queries of its own.

What is computed is told in `forward.py`. Here tensor cores form the next tile's scores and add to the output while the
other units are at this tile's softmax, and teams do not wait for each other. Gluon can say so, Triton cannot.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashbias import plan
from flashbias.tiles import Tiles

from .call import Call
from .hopper_load import load, task_at
from .hopper_softmax import scale_queries, softmax, start_scores, sums
from .teams import (
    LOADER,
    LOG2_E,
    WARPS,
    barriers,
    batch_row,
    columns,
    descriptor,
    following,
    inputs,
    launch,
    load_bias,
    matrix,
    pack,
    program,
    room_of,
    rooms_for,
    row_place,
    slope_of,
    steps,
    tails,
    unpack,
    widened,
)


@gluon.jit
def compute_task(
    i_team, rooms, ready, free, task, turn, made, sizes,
    C_V: gl.constexpr, SLOPES: gl.constexpr, CAUSAL: gl.constexpr, FOLDED: gl.constexpr, CHUNKS: gl.constexpr,
    ABREAST: gl.constexpr, DENSE: gl.constexpr, TEAMS: gl.constexpr, TAIL: gl.constexpr, WHOLE: gl.constexpr,
    OUT_TILES: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Output and LSE of a team's tile of queries; whose turn is next."""
    q_ready, k_ready, v_ready = ready
    q_free, k_free, v_free = free
    i_bh, m_first, n_tiles, p_slope = task
    slot, phase, q_phase = turn
    out, lse, out_tiles, out_rooms = made
    n_q, n_k, n_inner, n_heads, n_bh, offset, unit = sizes
    DTYPE: gl.constexpr = rooms[2].dtype
    BLOCK_M: gl.constexpr = rooms[0].shape[4]
    BLOCK_N: gl.constexpr = rooms[1].shape[4]
    STAGES: gl.constexpr = rooms[1].shape[0] // (TEAMS if DENSE else 1)
    WIDTH_V: gl.constexpr = rooms[2].shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH_V, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    LAST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TAIL, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 16])
    IN_PARTS: gl.constexpr = CHUNKS == 0 and WIDTH_V <= 32  # else the parts take registers that are needed
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    # Whether tiles that are checked have a loop of their own, which takes longer to compile, or a branch in the loop.
    APART: gl.constexpr = not CAUSAL or not SLOPES or WIDTH_V <= 32

    mbarrier.wait(q_ready.index(i_team), q_phase)
    if not FOLDED:  # columns are not over the unit: scores are as they are, over 1
        scale_queries(rooms, i_team, unit, TEAMS)
        unit = 1.0
    if DENSE:
        i_bh += i_team * n_heads
        n_q = gl.where(i_bh < n_bh, n_q, 0)  # beyond the batch nothing is written
    else:
        m_first += i_team * BLOCK_M
    n_whole = n_k // BLOCK_N  # tiles in which nothing needs to be checked
    if CAUSAL:
        n_whole = gl.maximum(gl.minimum(n_k, m_first + offset + 1), 0) // BLOCK_N
    n_checked = gl.maximum(n_tiles - n_whole, 1)
    # Distances as in the other kernel: those to the tile's first row, and what all of a tile's have in common apart.
    slope = 0.0
    if SLOPES:
        slope = gl.load(p_slope) / unit
    o_row = gl.arange(0, BLOCK_M, ROWS)
    o_last = n_k - 1
    if CAUSAL:
        o_last = gl.expand_dims(gl.minimum(o_last, m_first + o_row + offset), 1)
    b_steps = steps(BLOCK_N, SCORES, SLOPES)
    b_tail_steps = steps(TAIL, LAST, SLOPES)
    to_log2 = unit * LOG2_E
    b_zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    b_out = gl.zeros([BLOCK_M, WIDTH_V], gl.float32, OUT)

    # The last tile comes first, with TAIL of its keys: behind them are none. Then its weights are those of a whole one.
    b_max = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, LAST))
    b_none = gl.zeros([BLOCK_M, TAIL], gl.float32, LAST)
    n_first = (n_tiles - 1) * BLOCK_N
    mbarrier.wait(k_ready.index(slot), phase)
    b_tail_bias = matrix(rooms[3], slot).slice(0, TAIL, 1).load(LAST) if DENSE else 0
    b_tail = warpgroup_mma_wait(0, [start_scores(rooms, i_team, slot, b_none, TEAMS, CHUNKS, DENSE)])
    if DENSE:
        fence_async_shared()  # the bias may be on its way into registers still, and copies would overtake it
    mbarrier.arrive(k_free.index(slot), count=1)
    b_tail, b_max, _ = softmax(
        b_tail, b_tail_bias, b_max, slope, slope * (n_first - m_first - offset).to(gl.float32), b_tail_steps,
        o_last - n_first, unit, to_log2, SLOPES, DENSE, not WHOLE, True,
    )  # fmt: skip
    b_max = gl.convert_layout(b_max, ROWS, assert_trivial=True)
    b_sum = sums(b_tail, SUMS, IN_PARTS)
    b_pairs = pack(widened(b_tail, BLOCK_N, SCORES), DTYPE)

    for half in gl.static_range(0 if CAUSAL and APART else 1, 2):
        begin = n_checked if APART and half == 1 else 1
        end = n_checked if half == 0 else n_tiles
        for i_tile in range(begin, end):
            # The order matters: ptxas forms products one by one where it sees their registers used among them.
            n_first = (n_tiles - 1 - i_tile) * BLOCK_N
            next_slot, next_phase = following(slot, phase, STAGES)
            b_weights = unpack(b_pairs, DTYPE, WEIGHTS)
            mbarrier.wait(k_ready.index(next_slot), next_phase)
            b_next = start_scores(rooms, i_team, next_slot, b_zero, TEAMS, CHUNKS, DENSE)
            mbarrier.wait(v_ready.index(slot), phase)
            b_v = matrix(rooms[2], room_of(slot, i_team, TEAMS, DENSE))
            b_sums = warpgroup_mma(b_weights, b_v, b_out, is_async=True)
            b_bias = load_bias(rooms[3], next_slot, SCORES, False) if DENSE else 0
            b_s = warpgroup_mma_wait(1, [b_next])
            if not DENSE:
                mbarrier.arrive(k_free.index(next_slot), count=1)
            b_p, b_max, b_rescale = softmax(
                b_s, b_bias, b_max, slope, slope * (n_first - m_first - offset).to(gl.float32), b_steps,
                o_last - n_first, unit, to_log2, SLOPES, DENSE, half == 0 or not APART, APART or i_tile < n_checked,
            )  # fmt: skip
            b_less = gl.convert_layout(b_rescale, gl.SliceLayout(1, SUMS), assert_trivial=True)
            b_sum = b_sum * (gl.expand_dims(b_less, 1) if IN_PARTS else b_less) + sums(b_p, SUMS, IN_PARTS)
            b_out = warpgroup_mma_wait(0, [b_sums])
            mbarrier.arrive(v_free.index(slot), count=1)
            if DENSE:  # whose bias is in registers by now
                mbarrier.arrive(k_free.index(next_slot), count=1)
            b_pairs = pack(b_p, DTYPE)
            b_out = b_out * gl.expand_dims(gl.convert_layout(b_rescale, OUT_ROWS, assert_trivial=True), 1)
            slot = next_slot
            phase = next_phase
    if PERSISTENT:
        mbarrier.arrive(q_free.index(i_team), count=1)
    mbarrier.wait(v_ready.index(slot), phase)
    b_v = matrix(rooms[2], room_of(slot, i_team, TEAMS, DENSE))
    b_out = warpgroup_mma(unpack(b_pairs, DTYPE, WEIGHTS), b_v, b_out)
    if PERSISTENT:
        mbarrier.arrive(v_free.index(slot), count=1)

    if IN_PARTS:
        b_sum = gl.sum(b_sum, 1)
    b_sum = gl.convert_layout(b_sum, ROWS, assert_trivial=True)
    b_lse = gl.where(b_sum == 0.0, float("-inf"), b_max * unit + gl.log(b_sum))
    if SLOPES:
        b_lse -= slope * unit * o_row.to(gl.float32)
    gl.store(lse + i_bh * n_q + m_first + o_row, b_lse, mask=m_first + o_row < n_q)
    b_sum = gl.convert_layout(gl.where(b_sum == 0.0, 1.0, b_sum), OUT_ROWS, assert_trivial=True)
    o_m = gl.expand_dims(m_first + gl.arange(0, BLOCK_M, OUT_ROWS), 1)
    o_c = gl.expand_dims(gl.arange(0, WIDTH_V, gl.SliceLayout(0, OUT)), 0)
    b_out = (b_out * gl.expand_dims(1 / b_sum, 1) if DENSE else b_out / gl.expand_dims(b_sum, 1)).to(DTYPE)
    if OUT_TILES:
        # Threads would write 16 bytes of a row, and rows of a head are far from each other where heads are abreast.
        i_o, i_i = batch_row((i_bh // n_heads).to(gl.int32), n_inner)
        tma.store_wait(0)
        matrix(out_rooms, i_team).store(b_out)
        fence_async_shared()
        place = [i_o, i_i, (i_bh % n_heads).to(gl.int32), m_first, 0]
        tma.async_copy_shared_to_global(out_tiles, place, out_rooms.index(i_team))
    else:
        p_out = out + row_place(i_bh, o_m, n_q, n_heads, ABREAST) * C_V + o_c
        gl.store(p_out, b_out, mask=(o_m < n_q) & (o_c < C_V))
    slot, phase = following(slot, phase, STAGES)
    return slot, phase, q_phase ^ 1


@gluon.jit
def compute(
    i_team, rooms, ready, free, task, tasks, made, sizes,
    C_V: gl.constexpr, SLOPES: gl.constexpr, CAUSAL: gl.constexpr, FOLDED: gl.constexpr, CHUNKS: gl.constexpr,
    ABREAST: gl.constexpr, DENSE: gl.constexpr, TEAMS: gl.constexpr, TAIL: gl.constexpr, WHOLE: gl.constexpr,
    OUT_TILES: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """A team: its part of `task` or, PERSISTENT, of all tasks of the program."""
    if PERSISTENT:
        _, _, n_tiles, p_slope = task
        n_heads, n_tasks = tasks[1], tasks[3]
        slot = 0
        phase = 0
        q_phase = 0
        for i_task in range(gl.program_id(0), n_tasks, gl.num_programs(0)):
            i_b, i_h, _, m_first = task_at(i_task, tasks, rooms[0].shape[4], TEAMS)
            i_bh = (i_b * n_heads + i_h).to(gl.int64)
            slot, phase, q_phase = compute_task(
                i_team, rooms, ready, free, (i_bh, m_first, n_tiles, p_slope), (slot, phase, q_phase), made, sizes,
                C_V, SLOPES, CAUSAL, FOLDED, CHUNKS, ABREAST, DENSE, TEAMS, TAIL, WHOLE, OUT_TILES, PERSISTENT,
            )  # fmt: skip
    else:
        compute_task(
            i_team, rooms, ready, free, task, (0, 0, 0), made, sizes,
            C_V, SLOPES, CAUSAL, FOLDED, CHUNKS, ABREAST, DENSE, TEAMS, TAIL, WHOLE, OUT_TILES, PERSISTENT,
        )  # fmt: skip
    if OUT_TILES:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_q", "n_k", "n_batch", "n_inner", "n_heads", "group", "offset", "unit", "n_tasks"])
def forward_teams_kernel(
    q, k, v, q_columns, k_columns, bias, slopes, out, lse, out_tiles,
    n_q, n_k, n_batch, n_inner, n_heads, group, offset, unit, n_tasks,
    C_V: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr, FOLDED: gl.constexpr, CAUSAL: gl.constexpr,
    ABREAST: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TEAMS: gl.constexpr, REGISTERS: gl.constexpr,
    TAIL: gl.constexpr, WHOLE: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Output and LSE. What is read but for slopes are tensor descriptors (outer, inner, head, row, column).

    TAIL: how many keys of the last tile are computed with, BLOCK_N or fewer; without a causal mask only. WHOLE: that
    it has so many. PERSISTENT: a program takes several of the `n_tasks`; with a dense bias only. out_tiles: the output
    as a tensor descriptor, where it is to be written by tiles.
    """
    CHUNKS: gl.constexpr = RANK // CHUNK
    DENSE: gl.constexpr = bias is not None
    SPAN: gl.constexpr = BLOCK_M if DENSE else BLOCK_M * TEAMS  # queries of a program
    n_programs = gl.cdiv(n_q, SPAN)
    i_program, i_b, i_h, i_kv = program(n_programs, n_heads, group)
    if DENSE:
        i_b *= TEAMS
    i_o, i_i = batch_row(i_b, n_inner)
    m_first = (n_programs - 1 - i_program) * SPAN  # the longest first, if causal
    n_end = n_k
    if CAUSAL:
        n_end = gl.minimum(n_k, m_first + SPAN + offset)
    n_tiles = gl.maximum(gl.cdiv(n_end, BLOCK_N), 1)  # a tile that nobody attends to still makes zeros and -inf

    Q_ROOMS: gl.constexpr = TEAMS if FOLDED else 2 * TEAMS
    if RANK > 0:
        tensors = (q, k, v, q_columns, k_columns)
        rooms = (
            rooms_for(q, Q_ROOMS), rooms_for(k, STAGES), rooms_for(v, STAGES),
            rooms_for(q_columns, TEAMS * CHUNKS), rooms_for(k_columns, STAGES * CHUNKS),
        )  # fmt: skip
    elif DENSE:
        tensors = (q, k, v, bias)
        rooms = (
            rooms_for(q, Q_ROOMS), rooms_for(k, STAGES * TEAMS), rooms_for(v, STAGES * TEAMS), rooms_for(bias, STAGES),
        )  # fmt: skip
    else:
        tensors = (q, k, v)
        rooms = (rooms_for(q, Q_ROOMS), rooms_for(k, STAGES), rooms_for(v, STAGES))
    ready = (barriers(TEAMS, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    if PERSISTENT:
        free = (barriers(TEAMS, 1), barriers(STAGES, TEAMS), barriers(STAGES, TEAMS))
    else:  # a barrier that nobody looks at again would share its memory with something else
        free = (0, barriers(STAGES, TEAMS), barriers(STAGES, TEAMS))
    # Tuples that have a name lose what is constant in them.
    what = ((i_b * n_heads + i_h).to(gl.int64), m_first, n_tiles, slope_of(slopes, lse, i_o, i_i, i_h))
    OUT_TILES: gl.constexpr = out_tiles is not None
    made = (out, lse, out_tiles, rooms_for(out_tiles, TEAMS)) if OUT_TILES else (out, lse, 0, 0)
    sizes = (n_q, n_k, n_inner, n_heads, n_batch * n_heads, offset, unit)
    tasks = (n_q, n_heads, group, n_tasks)
    where = (i_b, n_inner, i_h, i_kv, m_first, n_tiles)
    SLOPES: gl.constexpr = slopes is not None
    if TEAMS == 1:
        gl.warp_specialize([
            (compute, (0, rooms, ready, free, what, tasks, made, sizes, C_V, SLOPES, CAUSAL, FOLDED,
                       CHUNKS, ABREAST, DENSE, TEAMS, TAIL, WHOLE, OUT_TILES, PERSISTENT)),
            (load, (tensors, rooms, ready, free, where, tasks, RANK, CHUNK, DENSE, TEAMS, PERSISTENT)),
        ], [1], [LOADER])  # fmt: skip
    elif TEAMS == 2:
        gl.warp_specialize([
            (compute, (0, rooms, ready, free, what, tasks, made, sizes, C_V, SLOPES, CAUSAL, FOLDED,
                       CHUNKS, ABREAST, DENSE, TEAMS, TAIL, WHOLE, OUT_TILES, PERSISTENT)),
            (compute, (1, rooms, ready, free, what, tasks, made, sizes, C_V, SLOPES, CAUSAL, FOLDED,
                       CHUNKS, ABREAST, DENSE, TEAMS, TAIL, WHOLE, OUT_TILES, PERSISTENT)),
            (load, (tensors, rooms, ready, free, where, tasks, RANK, CHUNK, DENSE, TEAMS, PERSISTENT)),
        ], [WARPS, 1], [REGISTERS, LOADER])  # fmt: skip
    else:
        gl.warp_specialize([
            (compute, (0, rooms, ready, free, what, tasks, made, sizes, C_V, SLOPES, CAUSAL, FOLDED,
                       CHUNKS, ABREAST, DENSE, TEAMS, TAIL, WHOLE, OUT_TILES, PERSISTENT)),
            (compute, (1, rooms, ready, free, what, tasks, made, sizes, C_V, SLOPES, CAUSAL, FOLDED,
                       CHUNKS, ABREAST, DENSE, TEAMS, TAIL, WHOLE, OUT_TILES, PERSISTENT)),
            (compute, (2, rooms, ready, free, what, tasks, made, sizes, C_V, SLOPES, CAUSAL, FOLDED,
                       CHUNKS, ABREAST, DENSE, TEAMS, TAIL, WHOLE, OUT_TILES, PERSISTENT)),
            (load, (tensors, rooms, ready, free, where, tasks, RANK, CHUNK, DENSE, TEAMS, PERSISTENT)),
        ], [WARPS, WARPS, 1], [REGISTERS, REGISTERS, LOADER])  # fmt: skip


def forward(call: Call, tiles: Tiles, out: Tensor, lse: Tensor, abreast: bool) -> None:
    """Write output and LSE of a call that `plan.teams` gives to this kernel; abreast: as in `output.py`."""
    tasks = plan.team_programs(tiles, plan.cdiv(out.shape[-2], tiles.block_m), out.shape, call.frame.traits)
    persistent = plan.is_short(call.frame.sizes["n_k"], call.frame.traits)
    programs = min(tasks, plan.places(tiles, out.device)) if persistent else tasks
    made = {"slopes": call.terms.slopes, "out": out, "lse": lse, "n_tasks": tasks}
    read = inputs(call, tiles) | columns(call, tiles) | {"out_tiles": written(call, tiles, out, abreast)}
    for tail, whole in tails(call, tiles):
        launch(
            forward_teams_kernel, call, tiles, programs, read, made, ABREAST=abreast, TAIL=tail, WHOLE=whole,
            PERSISTENT=persistent,
        )  # fmt: skip


def written(call: Call, tiles: Tiles, out: Tensor, abreast: bool) -> TensorDescriptor | None:
    """The output as it is written by tiles; None where threads write it."""
    if not (abreast and call.frame.traits["DENSE"]):
        return None
    block = call.frame.layout.block(out)
    lie = call.lie(block)
    return None if lie is None else descriptor(call, block, lie, tiles.block_m, call.frame.constants["WIDTH_V"])
