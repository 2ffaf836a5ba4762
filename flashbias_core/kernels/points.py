"""The factors of squared distances (`biases/distance.py`) in two launches, for calls without gradients.

The first finds the box around the points, in shares of them, the second takes both sides relative to its middle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias import plan

from .known import launch_known
from .replay import done, repeated, room

ENTRIES = 512  # of a tile
SHARES = 32  # of the points of a side, at most, among programs that look for the box
STRIDES = [
    "q_batch", "q_row", "q_column", "k_batch", "k_row", "k_column", "w_batch", "w_head", "w_row", "b_batch",
]  # fmt: skip


def distance_factors(x_q: Tensor, x_k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of `-w |x_q - x_k|^2` in fp32, `(*batch, H or 1, Nq, d + 2)` and `(*batch, 1, Nk, d + 2)`, contiguous.

    Points `(*batch, Nq or Nk, d)` and weights that broadcast to `(*batch, H, Nq)`, fp16 to fp64, not empty, of any
    strides. Points in fp64 are centred in fp64, others in fp32.
    """
    q_factor, k_factor = repeated("distances", (x_q, x_k, weight), lambda: _factors(x_q, x_k, weight))
    return q_factor, k_factor


def _factors(x_q: Tensor, x_k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight[(None,) * max(0, 2 - weight.dim())]
    (n_q, d), n_k, heads = x_q.shape[-2:], x_k.shape[-2], weight.shape[-2]
    batch = torch.broadcast_shapes(x_q.shape[:-2], x_k.shape[:-2])
    q_batch = torch.broadcast_shapes(batch, weight.shape[:-2])
    q_factor = room(x_q, (*q_batch, heads, n_q, d + 2), torch.float32)
    k_factor = room(x_q, (*batch, 1, n_k, d + 2), torch.float32)
    width = triton.next_power_of_2(d + 2)
    rows = max(ENTRIES // width, 1)
    sides = 1 if x_k is x_q else 2
    shares = min(SHARES, rows)
    parts = sides * min(shares, plan.cdiv(max(n_q, n_k), rows))
    exact = torch.promote_types(torch.promote_types(x_q.dtype, x_k.dtype), torch.float32)
    box = room(x_q, (*batch, 2, parts * d), exact)
    q, k = _folded(x_q, batch), _folded(x_k, batch)
    sizes = {"D": d, "WIDTH": width, "ROWS": rows}
    launch_known(
        box_kernel, (batch.numel(), parts), x_q.device,
        {"x_q": q, "x_k": k, "box": box, "n_q": n_q, "n_k": n_k} | _strides("q", q) | _strides("k", k),
        SIDES=sides, **sizes,
    )  # fmt: skip
    q, w, q_box = (_folded(x, q_batch) for x in (x_q, weight.expand(*weight.shape[:-1], n_q), box))
    w_batch, w_head, w_row = w.stride()
    q_programs = q_factor.shape[:-2].numel() * plan.cdiv(n_q, rows)
    launch_known(
        factors_kernel, (q_programs + batch.numel() * plan.cdiv(n_k, rows), 1), x_q.device,
        {"x_q": q, "x_k": k, "weight": w, "q_box": q_box, "k_box": box, "q_factor": q_factor, "k_factor": k_factor,
         "n_q": n_q, "n_k": n_k, "n_heads": heads, "n_parts": parts, "q_programs": q_programs,
         "w_batch": w_batch, "w_head": w_head, "w_row": w_row, "b_batch": q_box.stride(0)}
        | _strides("q", q) | _strides("k", k),
        PARTS=sides * shares, **sizes,
    )  # fmt: skip
    return q_factor, k_factor


def _folded(x: Tensor, batch: Sequence[int]) -> Tensor:
    """With all of the batch as one dimension before two others; copied where it does not fold into one."""
    x = x.expand(*batch, *x.shape[-2:])
    shape = (-1, *x.shape[-2:])
    try:
        return x.view(shape)
    except RuntimeError:
        return done(Tensor.reshape, x, shape)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{along}": stride for along, stride in zip(("batch", "row", "column"), x.stride(), strict=True)}


@triton.jit
def load_points(x, row, column, o_n, n, D: tl.constexpr, WIDTH: tl.constexpr):
    """Coordinates of points, `[ROWS, WIDTH]`: behind the last point its own, behind its last coordinate zeros."""
    o_d = tl.arange(0, WIDTH)[None, :]
    p_x = x + tl.minimum(o_n, n - 1).to(tl.int64) * row + o_d.to(tl.int64) * column
    return tl.load(p_x, mask=o_d < D, other=0.0)


@triton.jit
def store_box(
    x, row, column, n, i_share, n_shares, p_low, p_high, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The lowest and the highest coordinates of a share of the points; what is not finite makes a box without end."""
    b_low = tl.full([ROWS, WIDTH], float("inf"), p_low.dtype.element_ty)
    b_high = -b_low
    for first in range(i_share * ROWS, n, n_shares * ROWS):
        b_x = load_points(x, row, column, first + tl.arange(0, ROWS)[:, None], n, D, WIDTH).to(b_low.dtype)
        b_low = tl.minimum(b_low, tl.where(b_x == b_x, b_x, -float("inf")))
        b_high = tl.maximum(b_high, tl.where(b_x == b_x, b_x, float("inf")))
    o_d = tl.arange(0, WIDTH)
    tl.store(p_low + o_d, tl.min(b_low, 0), mask=o_d < D)
    tl.store(p_high + o_d, tl.max(b_high, 0), mask=o_d < D)


@triton.jit(do_not_specialize=["n_q", "n_k", *STRIDES[:6]])
def box_kernel(
    x_q, x_k, box, n_q, n_k, q_batch, q_row, q_column, k_batch, k_row, k_column,
    SIDES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Boxes around shares of the points of both sides, or of one, `(batch, 2, parts, d)`."""
    i_b, i_part, n_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    n_shares = n_parts // SIDES
    p_low = box + (i_b * 2 * n_parts + i_part) * D
    p_high = p_low + n_parts * D
    if i_part < n_shares:
        store_box(x_q + i_b * q_batch, q_row, q_column, n_q, i_part, n_shares, p_low, p_high, D, WIDTH, ROWS)
    else:
        i_share = i_part - n_shares
        store_box(x_k + i_b * k_batch, k_row, k_column, n_k, i_share, n_shares, p_low, p_high, D, WIDTH, ROWS)


@triton.jit
def load_relative(
    x, row, column, o_n, n, box, n_parts, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Coordinates relative to the middle of the box, or to 0 where it has none, and squared lengths, in fp32."""
    o_d = tl.arange(0, WIDTH)[None, :]
    p_low = box + tl.minimum(tl.arange(0, PARTS)[:, None], n_parts - 1) * D + o_d
    b_low = tl.min(tl.load(p_low, mask=o_d < D, other=0.0), 0)[None, :]
    b_high = tl.max(tl.load(p_low + n_parts * D, mask=o_d < D, other=0.0), 0)[None, :]
    b_centre = b_high - (b_high - b_low) * 0.5
    b_centre = tl.where(tl.abs(b_centre) < float("inf"), b_centre, 0.0)
    b_r = (load_points(x, row, column, o_n, n, D, WIDTH).to(b_centre.dtype) - b_centre).to(tl.float32)
    return b_r, tl.sum(b_r * b_r, 1)[:, None]


@triton.jit(do_not_specialize=["n_q", "n_k", "n_heads", "n_parts", "q_programs", *STRIDES])
def factors_kernel(
    x_q, x_k, weight, q_box, k_box, q_factor, k_factor, n_q, n_k, n_heads, n_parts, q_programs,
    q_batch, q_row, q_column, k_batch, k_row, k_column, w_batch, w_head, w_row, b_batch,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A block of rows of a factor, `-w (r, 1, |r|^2)` for queries, `(-2 r, |r|^2, 1)` for keys."""
    o_d = tl.arange(0, WIDTH)[None, :]
    if tl.program_id(0) < q_programs:
        n_blocks = tl.cdiv(n_q, ROWS)
        i_bh, i_block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
        i_b, i_h = i_bh // n_heads, i_bh % n_heads
        o_n = i_block * ROWS + tl.arange(0, ROWS)[:, None]
        b_r, b_square = load_relative(
            x_q + i_b * q_batch, q_row, q_column, o_n, n_q, q_box + i_b * b_batch, n_parts, D, WIDTH, PARTS
        )
        p_w = weight + i_b * w_batch + i_h * w_head + o_n.to(tl.int64) * w_row
        b_w = tl.load(p_w, mask=o_n < n_q, other=0.0).to(tl.float32)
        b_factor = -b_w * tl.where(o_d < D, b_r, tl.where(o_d == D, 1.0, b_square))
        p_factor = q_factor + (i_bh * n_q + o_n) * (D + 2) + o_d
        tl.store(p_factor, b_factor, mask=(o_n < n_q) & (o_d < D + 2))
    else:
        n_blocks = tl.cdiv(n_k, ROWS)
        i = tl.program_id(0) - q_programs
        i_b, i_block = (i // n_blocks).to(tl.int64), i % n_blocks
        o_n = i_block * ROWS + tl.arange(0, ROWS)[:, None]
        b_r, b_square = load_relative(
            x_k + i_b * k_batch, k_row, k_column, o_n, n_k, k_box + i_b * 2 * n_parts * D, n_parts, D, WIDTH, PARTS
        )
        b_factor = tl.where(o_d < D, -2 * b_r, tl.where(o_d == D, b_square, 1.0))
        p_factor = k_factor + (i_b * n_k + o_n) * (D + 2) + o_d
        tl.store(p_factor, b_factor, mask=(o_n < n_k) & (o_d < D + 2))
