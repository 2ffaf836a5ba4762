"""fp32 queries, keys and values as fp16 over units of each head, in two launches.

The first finds the largest magnitudes of every head, the second scales by what follows from them; no other kernel
and no copy comes between. A magnitude's bits, as an integer, have its order, and those of NaN are above all others'.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias import plan

from .known import launch_known
from .replay import repeated, room

DIMENSIONS = ("batch", "head", "row", "column")
ENTRIES = 4096  # of a tile
PROGRAMS, MAX_SHARES = 1024, 32  # that look for the largest: at least so many where heads are few; so many per head


def as_halves(
    query: Tensor, key: Tensor, value: Tensor, factor: float, largest: float, smallest: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values as fp16, and the unit of an output from them, `(*batch, H, 1, 1)` in fp32.

    All are `(*batch, H, N, C)` in fp32 with the same batch, heads and features, not empty, of any strides; what is
    made is contiguous, with the rows of a head side by side. In every head the largest value becomes `largest`, and
    queries and keys have the same largest entry, at most `largest`, with `factor` times the products. No magnitude
    counts as less than `smallest`.
    """
    settings = (factor, largest, smallest)
    q, k, v, unit = repeated(
        ("halves", *settings), (query, key, value), lambda: _as_halves(query, key, value, *settings)
    )
    return q, k, v, unit


def _as_halves(
    query: Tensor, key: Tensor, value: Tensor, factor: float, largest: float, smallest: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, n_q, c = query.shape[-3:]
    n_k, lead = key.shape[-2], query.shape[:-2]
    given = {"query": query, "key": key, "value": value}
    # Copies nothing, unless batch dimensions do not fold into one.
    inputs = {name: x.reshape(-1, *x.shape[-3:]) for name, x in given.items()}
    halves = {f"{name}_half": room(x, x.shape, torch.float16) for name, x in given.items()}
    unit = room(query, (*lead, 1, 1))
    arguments: dict[str, Any] = inputs | {"n_q": n_q, "n_k": n_k}
    for name, x in inputs.items():
        arguments |= {f"{name[0]}_{along}": stride for along, stride in zip(DIMENSIONS, x.stride(), strict=True)}
    width = plan.power_of_2(c)
    rows = max(ENTRIES // width, 1)
    number, blocks = lead.numel(), plan.cdiv(max(n_q, n_k), rows)
    shares = min(plan.power_of_2(plan.cdiv(PROGRAMS, 3 * number)), plan.power_of_2(blocks), MAX_SHARES)
    arguments |= {"most": room(query, (3, number, shares))}
    sizes = {"HEADS": heads, "SHARES": shares, "C": c, "WIDTH": width, "ROWS": rows}
    launch_known(most_kernel, (number, 3 * shares), query.device, arguments, **sizes)
    launch_known(
        halves_kernel, (number, 3 * blocks), query.device, arguments | halves | {"unit": unit},
        **sizes, FACTOR=factor, LARGEST=largest, SMALLEST=smallest,
    )  # fmt: skip
    return halves["query_half"], halves["key_half"], halves["value_half"], unit


@triton.jit
def find_most(
    x, s_row, s_column, n_rows, i_share,
    SHARES: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The bits of the largest magnitude in a share of the rows."""
    o_c = tl.arange(0, WIDTH)[None, :]
    b_most = tl.zeros([ROWS, WIDTH], tl.int32)
    for first in range(i_share * ROWS, n_rows, SHARES * ROWS):
        o_row = first + tl.arange(0, ROWS)[:, None]
        p_x = x + o_row.to(tl.int64) * s_row + o_c.to(tl.int64) * s_column
        b_x = tl.load(p_x, mask=(o_row < n_rows) & (o_c < C), other=0.0)
        b_most = tl.maximum(b_most, b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(tl.max(b_most, 1), 0)


@triton.jit(do_not_specialize=["n_q", "n_k"])
def most_kernel(
    query, key, value, most,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column, n_q, n_k,
    HEADS: tl.constexpr, SHARES: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The largest magnitudes of each head of queries, keys and values, `(3, heads, SHARES)`."""
    i_head = tl.program_id(0)
    i_tensor, i_share = tl.program_id(1) // SHARES, tl.program_id(1) % SHARES
    i_b, i_h = (i_head // HEADS).to(tl.int64), (i_head % HEADS).to(tl.int64)
    if i_tensor == 0:
        b_most = find_most(query + i_b * q_batch + i_h * q_head, q_row, q_column, n_q, i_share, SHARES, C, WIDTH, ROWS)
    elif i_tensor == 1:
        b_most = find_most(key + i_b * k_batch + i_h * k_head, k_row, k_column, n_k, i_share, SHARES, C, WIDTH, ROWS)
    else:
        b_most = find_most(value + i_b * v_batch + i_h * v_head, v_row, v_column, n_k, i_share, SHARES, C, WIDTH, ROWS)
    p_most = most + (i_tensor * tl.num_programs(0) + i_head) * SHARES + i_share
    tl.store(p_most, b_most.to(tl.float32, bitcast=True))


@triton.jit
def load_most(most, SHARES: tl.constexpr, SMALLEST: tl.constexpr):
    """The largest magnitude of all shares, `[1, 1]`; neither comparison drops NaN."""
    b_shares = tl.load(most + tl.arange(0, SHARES)[None, :]).to(tl.int32, bitcast=True)
    b_most = tl.max(b_shares, 1)[:, None].to(tl.float32, bitcast=True)
    return tl.where(b_most < SMALLEST, SMALLEST, b_most)


@triton.jit
def store_half(
    x, half, s_row, s_column, n_rows, i_block, b_factor, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """A block of rows times a factor, one over their unit: so many divisions would spill registers in triton 3.3."""
    o_row = i_block * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.arange(0, WIDTH)[None, :]
    inside = (o_row < n_rows) & (o_c < C)
    b_x = tl.load(x + o_row.to(tl.int64) * s_row + o_c.to(tl.int64) * s_column, mask=inside, other=0.0)
    tl.store(half + o_row.to(tl.int64) * C + o_c, (b_x * b_factor).to(tl.float16), mask=inside)


@triton.jit(do_not_specialize=["n_q", "n_k"])
def halves_kernel(
    query, key, value, query_half, key_half, value_half, most, unit,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column, n_q, n_k,
    HEADS: tl.constexpr, SHARES: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    FACTOR: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values over the units that follow from their largest magnitudes, and that of the values."""
    i_head, n_heads = tl.program_id(0), tl.num_programs(0)
    i_tensor, i_block = tl.program_id(1) % 3, tl.program_id(1) // 3
    i_b, i_h, i_made = (i_head // HEADS).to(tl.int64), (i_head % HEADS).to(tl.int64), i_head.to(tl.int64)
    if i_tensor == 2:
        b_v = load_most(most + (2 * n_heads + i_head) * SHARES, SHARES, SMALLEST)
        if i_block == 0:
            tl.store(unit + i_head + tl.arange(0, 1)[:, None], b_v * (1.0 / LARGEST))
        store_half(
            value + i_b * v_batch + i_h * v_head, value_half + i_made * n_k * C, v_row, v_column, n_k, i_block,
            tl.div_rn(tl.full([1, 1], LARGEST, tl.float32), b_v), C, WIDTH, ROWS,
        )  # fmt: skip
    else:
        b_q = load_most(most + i_head * SHARES, SHARES, SMALLEST)
        b_k = load_most(most + (n_heads + i_head) * SHARES, SHARES, SMALLEST)
        b_both = tl.sqrt_rn(b_q * b_k * FACTOR)
        b_both = tl.where(b_both > LARGEST, LARGEST, b_both)
        if i_tensor == 0:
            store_half(
                query + i_b * q_batch + i_h * q_head, query_half + i_made * n_q * C, q_row, q_column, n_q, i_block,
                tl.div_rn(b_both, b_q), C, WIDTH, ROWS,
            )  # fmt: skip
        else:
            store_half(
                key + i_b * k_batch + i_h * k_head, key_half + i_made * n_k * C, k_row, k_column, n_k, i_block,
                tl.div_rn(b_both, b_k), C, WIDTH, ROWS,
            )  # fmt: skip
