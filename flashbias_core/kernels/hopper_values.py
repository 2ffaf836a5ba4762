"""The gradient of a dense bias that all the batch shares, on Hopper, by a team of warps as in `hopper.py`.

What is computed is told in `backward.py`. A program sums dS of its tile of the bias over rows of the batch, which pass
by. Programs of several teams, which share what passes by, were slower (docs/kernels.md).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from flashbias import plan
from flashbias.tiles import Tiles

from .call import Call
from .teams import (
    LOADER,
    LOG2_E,
    WARPS,
    barriers,
    batch_row,
    floats,
    following,
    gradients,
    inputs,
    launch,
    load_bias,
    load_statistics,
    matrix,
    minus,
    rooms_for,
    start_copy,
)


@gluon.jit
def load(tensors, rooms, ready, free, place):
    """The warp that loads: the tile of the bias, then queries, keys, values and gradients of each member."""
    q, d_out, k, v, bias = tensors
    members_ready, bias_ready = ready
    i_plane, n_planes, begin, end, n_inner, n_heads, group, m_first, n_first = place
    STAGES: gl.constexpr = rooms[0].shape[0]
    BLOCK_M: gl.constexpr = bias.block_shape[3]
    BLOCK_N: gl.constexpr = bias.block_shape[4]
    FEATURES: gl.constexpr = q.block_shape[4] + d_out.block_shape[4]
    bar = bias_ready.index(0)
    mbarrier.expect(bar, BLOCK_M * BLOCK_N * 2)  # bytes
    start_copy(bias, 0, 0, i_plane, m_first, n_first, bar, rooms[4].index(0))
    slot = 0
    phase = 1
    for i_member in range(begin, end):
        i_bh = i_member * n_planes + i_plane  # a plane is that of all heads, or there is one for each
        i_o, i_i = batch_row(i_bh // n_heads, n_inner)
        i_h = i_bh % n_heads
        bar = members_ready.index(slot)
        mbarrier.wait(free.index(slot), phase)
        mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * FEATURES * 2)
        start_copy(q, i_o, i_i, i_h, m_first, 0, bar, rooms[0].index(slot))
        start_copy(d_out, i_o, i_i, i_h, m_first, 0, bar, rooms[1].index(slot))
        start_copy(k, i_o, i_i, i_h // group, n_first, 0, bar, rooms[2].index(slot))
        start_copy(v, i_o, i_i, i_h // group, n_first, 0, bar, rooms[3].index(slot))
        slot, phase = following(slot, phase, STAGES)


@gluon.jit
def compute(rooms, ready, free, place, statistics, d_values, sizes):
    """The team: the sum of its tile's dS over members."""
    members_ready, bias_ready = ready
    i_plane, n_planes, begin, end, m_first, n_first, i_written = place
    level, delta = statistics
    n_q, n_k, unit = sizes
    STAGES: gl.constexpr = rooms[0].shape[0]
    BLOCK_M: gl.constexpr = rooms[4].shape[4]
    BLOCK_N: gl.constexpr = rooms[4].shape[5]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    o_m = m_first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORES))
    to_log2 = unit * LOG2_E
    b_zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    b_sum = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(bias_ready.index(0), 0)
    slot = 0
    phase = 0
    for i_member in range(begin, end):
        i_bh = (i_member * n_planes + i_plane).to(gl.int64)
        b_level, b_delta = load_statistics(level, delta, i_bh, n_q, o_m)
        mbarrier.wait(members_ready.index(slot), phase)
        b_k, b_v = matrix(rooms[2], slot).permute((1, 0)), matrix(rooms[3], slot).permute((1, 0))
        b_s = warpgroup_mma(matrix(rooms[0], slot), b_k, b_zero, use_acc=False, is_async=True)
        b_dp = warpgroup_mma(matrix(rooms[1], slot), b_v, b_zero, use_acc=False, is_async=True)
        b_bias = load_bias(rooms[4], 0, SCORES, False)
        b_s, b_dp = warpgroup_mma_wait(0, [b_s, b_dp])
        mbarrier.arrive(free.index(slot), count=1)
        b_x = floats(b_bias) * LOG2_E + gl.expand_dims(minus(b_level), 1)
        b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, to_log2), b_x))
        b_sum = gl.fma(b_p, b_dp - gl.expand_dims(b_delta, 1), b_sum)
        slot, phase = following(slot, phase, STAGES)
    o_m = gl.expand_dims(o_m, 1)
    o_n = gl.expand_dims(n_first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES)), 0)
    p_values = d_values + (i_written * n_q + o_m) * n_k + o_n
    gl.store(p_values, b_sum, mask=(o_m < n_q) & (o_n < n_k))


@gluon.jit(do_not_specialize=["n_planes", "n_splits", "n_q", "n_k", "n_batch", "n_inner", "n_heads", "group", "unit"])
def values_teams_kernel(
    q, k, v, d_out, bias, level, delta, d_values, n_planes, n_splits, n_q, n_k, n_batch, n_inner, n_heads, group, unit,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TEAMS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """The gradient, `(n_splits, n_planes, n_q, n_k)`: of the members that share a plane each split sums some."""
    gl.static_assert(TEAMS == 1)
    n_m, n_n = gl.cdiv(n_q, BLOCK_M), gl.cdiv(n_k, BLOCK_N)
    i_tile, i_rest = gl.program_id(0) % (n_m * n_n), gl.program_id(0) // (n_m * n_n)
    i_plane, i_split = i_rest % n_planes, i_rest // n_planes
    m_first, n_first = i_tile // n_n * BLOCK_M, i_tile % n_n * BLOCK_N
    n_members = n_batch * (n_heads // n_planes)
    begin, end = n_members * i_split // n_splits, n_members * (i_split + 1) // n_splits

    tensors = (q, d_out, k, v, bias)
    rooms = (
        rooms_for(q, STAGES), rooms_for(d_out, STAGES), rooms_for(k, STAGES), rooms_for(v, STAGES), rooms_for(bias, 1),
    )  # fmt: skip
    ready = (barriers(STAGES, 1), barriers(1, 1))
    free = barriers(STAGES, 1)
    # Tuples that have a name lose what is constant in them.
    what = (i_plane, n_planes, begin, end, m_first, n_first, i_rest.to(gl.int64))
    rows = (level, delta)
    sizes = (n_q, n_k, unit)
    where = (i_plane, n_planes, begin, end, n_inner, n_heads, group, m_first, n_first)
    gl.warp_specialize([
        (compute, (rooms, ready, free, what, rows, d_values, sizes)),
        (load, (tensors, rooms, ready, free, where)),
    ], [1], [LOADER])  # fmt: skip


def backward(call: Call, tiles: Tiles, statistics: dict[str, Any], d_values: Tensor) -> bool:
    """Write the gradient in parts, `(splits, heads or 1, Nq, Nk)`, of a call that `plan.teams` gives to this kernel.

    False, with nothing written, where what is read lies in memory so that hardware cannot copy tiles of it.
    """
    read = gradients(call, statistics["d_out"], None, (tiles.block_m, 0), 0)
    if read is None:
        return False
    made = {"level": statistics["level"], "delta": statistics["delta"], "d_values": d_values}
    splits, planes, n_q, n_k = d_values.shape
    programs = plan.values_programs(tiles, n_q, n_k) * splits * planes
    read = inputs(call, tiles) | {"d_out": read["d_out"]}
    launch(values_teams_kernel, call, tiles, programs, read, made, n_splits=splits, n_planes=planes)
    return True
