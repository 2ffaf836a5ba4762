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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashbias import plan
from flashbias.tiles import Tiles

from .call import Call
from .teams import (
    LOADER,
    LOG2_E,
    WARPS,
    barriers,
    batch_row,
    columns,
    floats,
    in_parts,
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
    start_copy,
    steps,
    tails,
    unpack,
    widened,
)


@gluon.jit
def load(
    tensors, rooms, ready, free, place, RANK: gl.constexpr, CHUNK: gl.constexpr, DENSE: gl.constexpr,
    TEAMS: gl.constexpr,
):  # fmt: skip
    """The warp that loads: queries for every team, then keys and values tile by tile, the last ones first."""
    q, k, v = tensors[0], tensors[1], tensors[2]
    q_ready, k_ready, v_ready = ready
    k_free, v_free = free
    i_b, n_inner, i_h, i_kv, m_first, n_tiles = place
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
        mbarrier.expect(q_ready.index(i_team), BLOCK_M * COLUMNS * 2)  # bytes
        start_copy(q, i_o, i_i, i_h, first, 0, q_ready.index(i_team), rooms[0].index(i_team))
        for i in gl.static_range(RANK // CHUNK):
            room = rooms[3].index(i_team * (RANK // CHUNK) + i)
            start_copy(tensors[3], i_o, i_i, i_h, first, i * CHUNK, q_ready.index(i_team), room)
    slot = 0
    phase = 1
    for i_tile in range(n_tiles):
        first = (n_tiles - 1 - i_tile) * BLOCK_N
        mbarrier.wait(k_free.index(slot), phase)
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
        mbarrier.wait(v_free.index(slot), phase)
        mbarrier.expect(v_ready.index(slot), ROWS * BLOCK_N * v.block_shape[4] * 2)
        for i in gl.static_range(ROWS):
            if DENSE:
                i_o, i_i = batch_row(i_b + i, n_inner)
            start_copy(v, i_o, i_i, i_kv, first, 0, v_ready.index(slot), rooms[2].index(slot * ROWS + i))
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


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
    SLOPES: gl.constexpr, DENSE: gl.constexpr, CHECK: gl.constexpr,
):  # fmt: skip
    """Weights of a tile, the new maximum of each row, and what sums over earlier tiles are to be multiplied by.

    `b_last` is how far into the tile a query attends: looked at where CHECK.
    """
    if DENSE:
        b_s = gl.fma(floats(b_bias), gl.full_like(b_s, 1 / unit), b_s)
    if SLOPES:
        b_s = gl.fma(gl.full_like(b_s, slope), b_steps + gl.zeros_like(b_s), b_s)
    if CHECK:
        b_s = gl.where(b_steps <= b_last, b_s, float("-inf"))
    b_new = gl.maximum(b_max, gl.max(b_s, 1) + ahead if SLOPES else gl.max(b_s, 1))
    b_shift = b_new
    if CHECK or DENSE:
        b_shift = gl.where(b_new == float("-inf"), 0.0, b_new)
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


@gluon.jit
def compute(
    i_team, rooms, ready, free, place, made, sizes,
    C_V: gl.constexpr, SLOPES: gl.constexpr, CAUSAL: gl.constexpr, FOLDED: gl.constexpr, CHUNKS: gl.constexpr,
    ABREAST: gl.constexpr, DENSE: gl.constexpr, TEAMS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """A team: output and LSE of its tile of queries."""
    q_ready, k_ready, v_ready = ready
    k_free, v_free = free
    i_bh, m_first, n_tiles, p_slope = place
    out, lse = made
    n_q, n_k, n_heads, n_bh, offset, unit = sizes
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

    mbarrier.wait(q_ready.index(i_team), 0)
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
    mbarrier.wait(k_ready.index(0), 0)
    b_tail = warpgroup_mma_wait(0, [start_scores(rooms, i_team, 0, b_none, TEAMS, CHUNKS, DENSE)])
    b_tail_bias = matrix(rooms[3], 0).slice(0, TAIL, 1).load(LAST) if DENSE else 0
    mbarrier.arrive(k_free.index(0), count=1)
    b_tail, b_max, _ = softmax(
        b_tail, b_tail_bias, b_max, slope, slope * (n_first - m_first - offset).to(gl.float32), b_tail_steps,
        o_last - n_first, unit, to_log2, SLOPES, DENSE, True,
    )  # fmt: skip
    b_max = gl.convert_layout(b_max, ROWS, assert_trivial=True)
    b_sum = sums(b_tail, SUMS, IN_PARTS)
    b_pairs = pack(widened(b_tail, BLOCK_N, SCORES), DTYPE)

    slot = 0
    phase = 0
    for part in gl.static_range(0 if CAUSAL else 1, 2):  # without a diagonal only the first tile is checked
        begin = 1 if part == 0 else n_checked
        end = n_checked if part == 0 else n_tiles
        for i_tile in range(begin, end):
            # The order matters: ptxas forms products one by one where it sees their registers used among them.
            n_first = (n_tiles - 1 - i_tile) * BLOCK_N
            next_slot = slot + 1
            next_phase = phase
            if next_slot == STAGES:
                next_slot = 0
                next_phase = phase ^ 1
            b_weights = unpack(b_pairs, DTYPE, WEIGHTS)
            mbarrier.wait(k_ready.index(next_slot), next_phase)
            b_next = start_scores(rooms, i_team, next_slot, b_zero, TEAMS, CHUNKS, DENSE)
            mbarrier.wait(v_ready.index(slot), phase)
            b_v = matrix(rooms[2], room_of(slot, i_team, TEAMS, DENSE))
            b_sums = warpgroup_mma(b_weights, b_v, b_out, is_async=True)
            b_bias = load_bias(rooms[3], next_slot, SCORES, False) if DENSE else 0
            b_s = warpgroup_mma_wait(1, [b_next])
            mbarrier.arrive(k_free.index(next_slot), count=1)
            b_p, b_max, b_rescale = softmax(
                b_s, b_bias, b_max, slope, slope * (n_first - m_first - offset).to(gl.float32), b_steps,
                o_last - n_first, unit, to_log2, SLOPES, DENSE, part == 0,
            )  # fmt: skip
            b_less = gl.convert_layout(b_rescale, gl.SliceLayout(1, SUMS), assert_trivial=True)
            b_sum = b_sum * (gl.expand_dims(b_less, 1) if IN_PARTS else b_less) + sums(b_p, SUMS, IN_PARTS)
            b_out = warpgroup_mma_wait(0, [b_sums])
            mbarrier.arrive(v_free.index(slot), count=1)
            b_pairs = pack(b_p, DTYPE)
            b_out = b_out * gl.expand_dims(gl.convert_layout(b_rescale, OUT_ROWS, assert_trivial=True), 1)
            slot = next_slot
            phase = next_phase
    mbarrier.wait(v_ready.index(slot), phase)
    b_v = matrix(rooms[2], room_of(slot, i_team, TEAMS, DENSE))
    b_out = warpgroup_mma(unpack(b_pairs, DTYPE, WEIGHTS), b_v, b_out)

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
    b_out = (b_out / gl.expand_dims(b_sum, 1)).to(DTYPE)
    p_out = out + row_place(i_bh, o_m, n_q, n_heads, ABREAST) * C_V + o_c
    gl.store(p_out, b_out, mask=(o_m < n_q) & (o_c < C_V))


@gluon.jit(do_not_specialize=["n_q", "n_k", "n_batch", "n_inner", "n_heads", "group", "offset", "unit"])
def forward_teams_kernel(
    q, k, v, q_columns, k_columns, bias, slopes, out, lse, n_q, n_k, n_batch, n_inner, n_heads, group, offset, unit,
    C_V: gl.constexpr, RANK: gl.constexpr, CHUNK: gl.constexpr, FOLDED: gl.constexpr, CAUSAL: gl.constexpr,
    ABREAST: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TEAMS: gl.constexpr, REGISTERS: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """Output and LSE. What is read but for slopes are tensor descriptors (outer, inner, head, row, column).

    TAIL: how many keys of the last tile are computed with, BLOCK_N or fewer; without a causal mask only.
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
    free = (barriers(STAGES, TEAMS), barriers(STAGES, TEAMS))
    # Tuples that have a name lose what is constant in them.
    what = ((i_b * n_heads + i_h).to(gl.int64), m_first, n_tiles, slope_of(slopes, lse, i_o, i_i, i_h))
    made = (out, lse)
    sizes = (n_q, n_k, n_heads, n_batch * n_heads, offset, unit)
    where = (i_b, n_inner, i_h, i_kv, m_first, n_tiles)
    SLOPES: gl.constexpr = slopes is not None
    if TEAMS == 1:
        gl.warp_specialize([
            (compute, (0, rooms, ready, free, what, made, sizes, C_V, SLOPES, CAUSAL, FOLDED, CHUNKS,
                       ABREAST, DENSE, TEAMS, TAIL)),
            (load, (tensors, rooms, ready, free, where, RANK, CHUNK, DENSE, TEAMS)),
        ], [1], [LOADER])  # fmt: skip
    elif TEAMS == 2:
        gl.warp_specialize([
            (compute, (0, rooms, ready, free, what, made, sizes, C_V, SLOPES, CAUSAL, FOLDED, CHUNKS,
                       ABREAST, DENSE, TEAMS, TAIL)),
            (compute, (1, rooms, ready, free, what, made, sizes, C_V, SLOPES, CAUSAL, FOLDED, CHUNKS,
                       ABREAST, DENSE, TEAMS, TAIL)),
            (load, (tensors, rooms, ready, free, where, RANK, CHUNK, DENSE, TEAMS)),
        ], [WARPS, 1], [REGISTERS, LOADER])  # fmt: skip
    else:
        gl.warp_specialize([
            (compute, (0, rooms, ready, free, what, made, sizes, C_V, SLOPES, CAUSAL, FOLDED, CHUNKS,
                       ABREAST, DENSE, TEAMS, TAIL)),
            (compute, (1, rooms, ready, free, what, made, sizes, C_V, SLOPES, CAUSAL, FOLDED, CHUNKS,
                       ABREAST, DENSE, TEAMS, TAIL)),
            (compute, (2, rooms, ready, free, what, made, sizes, C_V, SLOPES, CAUSAL, FOLDED, CHUNKS,
                       ABREAST, DENSE, TEAMS, TAIL)),
            (load, (tensors, rooms, ready, free, where, RANK, CHUNK, DENSE, TEAMS)),
        ], [WARPS, WARPS, 1], [REGISTERS, REGISTERS, LOADER])  # fmt: skip


def forward(call: Call, tiles: Tiles, out: Tensor, lse: Tensor, abreast: bool) -> None:
    """Write output and LSE of a call that `plan.teams` gives to this kernel; abreast: as in `output.py`."""
    programs = plan.team_programs(tiles, plan.cdiv(out.shape[-2], tiles.block_m), out.shape, call.frame.traits)
    made = {"slopes": call.terms.slopes, "out": out, "lse": lse}
    read = inputs(call, tiles) | columns(call, tiles)
    for tail in tails(call, tiles):
        launch(forward_teams_kernel, call, tiles, programs, read, made, ABREAST=abreast, TAIL=tail)
