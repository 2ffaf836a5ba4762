"""What the kernels of teams share (`hopper*.py`): shared memory and its barriers, halves in registers, the launch.

Teams of a program have the same head. Without a dense bias they have neighbouring tiles of the same row of the batch,
with one the same tile of neighbouring rows, so that they share a tile of the bias.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashbias import plan
from flashbias.tiles import LOADER as LOADER_REGISTERS
from flashbias.tiles import Tiles

from . import ahead, backward, compiled, terms
from .call import Call
from .passes import Description, with_tensor, without_tensor

WARPS = gl.constexpr(4)  # of a team: as many as form one product together
LOG2_E, LOWEST = gl.constexpr(terms.LOG2_E.value), gl.constexpr(terms.LOWEST.value)
LOADER = gl.constexpr(LOADER_REGISTERS)
PITCH = gl.constexpr(backward.PITCH.value)
copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name up to triton 3.6


@gluon.jit
def part(i, n_parts, n_heads, group):
    """Number, row of the batch, head and key head of the i-th of all parts, over (batch, head, number)."""
    i_bh = i // n_parts
    i_h = i_bh % n_heads
    return i % n_parts, i_bh // n_heads, i_h, i_h // group


@gluon.jit
def program(n_programs, n_heads, group):
    """As `part`, of the programs."""
    return part(gl.program_id(0), n_programs, n_heads, group)


@gluon.jit
def pitch(n_q):
    """As in `backward.py`."""
    return gl.cdiv(n_q, PITCH) * PITCH


@gluon.jit
def row_place(i_bh, o_m, n_q, n_heads, ABREAST: gl.constexpr):
    """As in `terms.py`."""
    if ABREAST:
        return (i_bh // n_heads * n_q + o_m) * n_heads + i_bh % n_heads
    return i_bh * n_q + o_m


@gluon.jit
def load_statistics(level, delta, i_bh, n_q, o_m):
    """Level and delta of a tile's queries, which behind the last have no probabilities."""
    o_place = i_bh * pitch(n_q) + o_m
    return gl.load(level + o_place), gl.load(delta + o_place)


@gluon.jit
def batch_row(i_b, n_inner):
    """Outer and inner batch of a row of the batch."""
    return i_b // n_inner, i_b % n_inner


@gluon.jit
def slope_of(slopes, spare, i_o, i_i, i_h):
    """Where a head's slope is; where there are none, `spare`, which is not looked at."""
    p_slope = spare
    if slopes is not None:
        p_slope = slopes.ptr + i_o.to(gl.int64) * slopes.outer
        p_slope += i_i.to(gl.int64) * slopes.inner + i_h * slopes.head
    return p_slope


@gluon.jit
def start_copy(x, i_o, i_i, i_h, first, column, ready, room):
    """Start to copy rows `first ...` and columns `column ...` of a tensor; what it broadcasts over has size 1."""
    i_o = gl.minimum(i_o, x.shape[0] - 1)
    i_i = gl.minimum(i_i, x.shape[1] - 1)
    i_h = gl.minimum(i_h, x.shape[2] - 1)
    copy(x, [i_o, i_i, i_h, first, column], ready, room)


@gluon.jit
def rooms_for(x, NUMBER: gl.constexpr):
    """Shared memory for so many tiles of a tensor."""
    return gl.allocate_shared_memory(x.dtype, [NUMBER] + x.block_shape, x.layout)


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def matrix(rooms, i):
    """What lies in a room, rows by columns."""
    room = rooms.index(i)
    return room.reshape([room.shape[3], room.shape[4]])


@gluon.jit
def room_of(slot, i_team, TEAMS: gl.constexpr, DENSE: gl.constexpr):
    """The room of what passes by: with a dense bias each team, which has a row of the batch, has one of its own."""
    return slot * TEAMS + i_team if DENSE else slot


@gluon.jit
def following(slot, phase, STAGES: gl.constexpr):
    """The slot after this one, and the phase of its barriers: another one from round to round."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def load_bias(rooms, slot, LAYOUT: gl.constexpr, TURNED: gl.constexpr):
    """A tile of a dense bias, queries by keys or, TURNED, keys by queries."""
    tile = matrix(rooms, slot)
    return (tile.permute((1, 0)) if TURNED else tile).load(LAYOUT)


@gluon.jit
def floats(b_x):
    """Halves as fp32: a pair of bf16 by two instructions, where the compiler takes three."""
    if b_x.dtype.is_bf16():
        b_x = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [b_x], gl.float32, is_pure=True, pack=2
        )
    return b_x.to(gl.float32)


@gluon.jit
def steps(NUMBER: gl.constexpr, LAYOUT: gl.constexpr, SLOPES: gl.constexpr):
    """How far into a tile its keys are."""
    b_steps = gl.expand_dims(gl.arange(0, NUMBER, gl.SliceLayout(0, LAYOUT)), 0)
    return b_steps.to(gl.float32) if SLOPES else b_steps


@gluon.jit
def in_parts(b_x, LAYOUT: gl.constexpr):
    """Sums of each row that a thread can make alone."""
    b_x = gl.sum(b_x.reshape([b_x.shape[0], b_x.shape[1] // 8, 8]), 1)
    return gl.convert_layout(b_x, LAYOUT, assert_trivial=True)


@gluon.jit
def widened(b_x, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """What belongs to a tile's first keys, and zeros for the others."""
    for _ in gl.static_range(3):  # up to eight times as many
        if b_x.shape[1] < BLOCK_N:
            b_x = gl.join(b_x, gl.zeros_like(b_x)).permute((0, 2, 1)).reshape([b_x.shape[0], b_x.shape[1] * 2])
    return gl.convert_layout(b_x, LAYOUT, assert_trivial=True)


@gluon.jit
def minus(b_x):
    """`-x` of fp32 that was read, as part of what uses it: the compiler has an instruction flip the sign."""
    return gl.inline_asm_elementwise("neg.f32 $0, $1;", "=r,r", [b_x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def pack(b_p, DTYPE: gl.constexpr):
    """Neighbours in half precision, as one integer: halves that a loop carries one by one take it 64 instructions."""
    b_even, b_odd = gl.split(b_p.reshape([b_p.shape[0], b_p.shape[1] // 2, 2]))
    KIND: gl.constexpr = "bf16x2" if DTYPE.is_bf16() else "f16x2"
    return gl.inline_asm_elementwise(
        "cvt.rn." + KIND + ".f32 $0, $2, $1;", "=r,r,r", [b_even, b_odd], gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpack(b_pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    b_even = (b_pairs & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
    b_odd = (b_pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.join(b_even, b_odd).reshape([b_pairs.shape[0], b_pairs.shape[1] * 2]), LAYOUT)


@gluon.jit
def lost(b_x, b_pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """What numbers lose as half precision in pairs, in pairs too; one by one they are converted as slowly as exp2."""
    return pack(b_x + minus(floats(unpack(b_pairs, DTYPE, LAYOUT))), DTYPE)


def inputs(call: Call, tiles: Tiles) -> dict[str, TensorDescriptor | None]:
    """Queries, keys, values and a dense bias, as they are read by tiles."""
    width, width_v = call.frame.constants["WIDTH"], call.frame.constants["WIDTH_V"]
    lie = call.frame.tensors
    bias = None
    if call.terms.matrix is not None:
        bias = descriptor(call, call.terms.matrix, lie["values"], tiles.block_m, tiles.block_n)
    return {
        "q": descriptor(call, call.q, lie["query"], tiles.block_m, width),
        "k": descriptor(call, call.k, lie["key"], tiles.block_n, width),
        "v": descriptor(call, call.v, lie["value"], tiles.block_n, width_v),
        "bias": bias,
    }


def columns(call: Call, tiles: Tiles) -> dict[str, TensorDescriptor | None]:
    """Columns of the bias' factors, as they are read by tiles, None where there are none."""
    given = {"q_columns": (call.terms.q_columns, tiles.block_m), "k_columns": (call.terms.k_columns, tiles.block_n)}
    chunk, lie = call.frame.constants["CHUNK"], call.frame.tensors
    return {
        name: None if block is None else descriptor(call, block, lie[name], rows, chunk)
        for name, (block, rows) in given.items()
    }


def gradients(
    call: Call, d_out: terms.Block, gradient_columns: terms.Block | None, rows: tuple[int, int], rank: int
) -> dict[str, TensorDescriptor | None] | None:
    """Gradients of outputs, and columns for gradients of factors, as many rows at a time; None where they cannot."""
    width = call.frame.constants["WIDTH_V"]
    given = {"d_out": (d_out, rows[0], width), "gradient_columns": (gradient_columns, rows[1], rank)}
    read: dict[str, TensorDescriptor | None] = {}
    for name, (block, *size) in given.items():
        lie = None if block is None else call.lie(block)
        if block is not None and lie is None:
            return None
        read[name] = None if block is None else descriptor(call, block, lie, *size)
    return read


def descriptor(
    call: Call, block: terms.Block, lie: tuple[list[int], list[int]] | None, rows: int, columns: int
) -> TensorDescriptor:
    """A tensor, of which hardware copies tiles of so many rows and columns."""
    assert lie is not None  # where it is, the call is not `PLAIN`
    like = call.frame.once(("tile", id(lie), rows, columns), partial(_description, block.ptr.dtype, lie, rows, columns))
    return with_tensor(like, block.ptr)


def _description(dtype: torch.dtype, lie: tuple[list[int], list[int]], rows: int, columns: int) -> Description:
    """That of a tensor whose lie `call.py` has checked, which triton would do again at every new length."""
    kind, fields = _tile(dtype, rows, columns)
    shape, strides = lie
    return kind, fields | {"shape": shape, "strides": strides}


@cache
def _tile(dtype: torch.dtype, rows: int, columns: int) -> Description:
    """The description of a tensor that is one tile; it says how tiles lie in shared memory."""
    shape = [1, 1, 1, rows, columns]
    tile = torch.empty(shape, dtype=dtype, device="meta")
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(shape, kind)
    return without_tensor(TensorDescriptor(tile, shape, list(tile.stride()), shape, layout))


def tails(call: Call, tiles: Tiles) -> tuple[tuple[int, bool], ...]:
    """As `plan.tail`; in a survey, what other lengths would want as well."""
    known = tiles, call.frame.sizes["n_k"], call.frame.traits
    return plan.tails(*known) if ahead.is_surveying() else (plan.tail(*known),)


def launch(
    kernel: Any, call: Call, tiles: Tiles, programs: int, read: dict[str, Any], tensors: dict[str, Any],
    **constants: Any,
) -> None:  # fmt: skip
    """Launch a kernel of teams with what is read by tiles, other tensors, and the constants of this launch alone."""
    key = (id(kernel), tiles, *compiled.kinds(kernel, tensors), *constants.values())
    sizes = call.frame.once(("sizes", id(kernel)), partial(_sizes, kernel, call))
    common = partial(_common, kernel, call, tiles, constants)
    compiled.launch(kernel, (programs, 1), read | tensors | sizes, common, call.frame.compiled, key)


def _sizes(kernel: Any, call: Call) -> dict[str, Any]:
    """Sizes of the call that the kernel has arguments for."""
    sizes = call.frame.sizes | {"n_batch": call.frame.layout.outer * call.frame.layout.inner}
    return {name: size for name, size in sizes.items() if name in kernel.arg_names}


def _common(kernel: Any, call: Call, tiles: Tiles, constants: dict[str, Any]) -> dict[str, Any]:
    """All constants of a launch: also those of the call that the kernel has arguments for."""
    given = {name: value for name, value in call.frame.constants.items() if name in kernel.arg_names}
    return given | constants | tiles.options()
