"""The factors of squared distances (`biases/distance.py`) in two launches, for calls without gradients.

The first finds the box around the points, in shares of them, the second takes both sides relative to its middle. The
box and the largest weight also bound the factors, which can then be written as columns in half precision at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias import plan

from .columns import HALVES, K_LOW, Q_LOW, balance, half, invertible, padded
from .known import launch_known
from .replay import done, repeated, room

ENTRIES = 512  # of a tile that is read
WRITTEN = 4096  # of a tile that is written, in halves half as many
SHARES = 32  # of the points of a side, at most, among programs that look for the box
BOX = tl.constexpr(3)  # rows of a box: the lowest coordinates, the highest, the largest finite magnitudes
STRIDES = [
    "q_batch", "q_row", "q_column", "k_batch", "k_row", "k_column", "w_batch", "w_head", "w_row", "b_batch",
]  # fmt: skip


def distance_factors(
    x_q: Tensor, x_k: Tensor, weight: Tensor, unit: float | None = None, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Factors of `-w |x_q - x_k|^2`, `(*batch, H or 1, Nq, d + 2)` and `(*batch, 1, Nk, d + 2)`, contiguous.

    In fp32, or where they are to be `exact` in float64. With `unit` those of the bias over it, as columns that kernels
    take beside half precision (`columns.py`), in fp16.

    Points `(*batch, Nq or Nk, d)` and weights that broadcast to `(*batch, H, Nq)`, fp16 to fp64, not empty, of any
    strides. Points in fp64, and of `exact` factors, are centred in fp64, others in fp32.
    """
    dtype = torch.float16 if unit is not None else torch.float64 if exact else torch.float32
    q_factor, k_factor = repeated(
        ("distances", unit, dtype), (x_q, x_k, weight), lambda: _factors(x_q, x_k, weight, unit, dtype)
    )
    return q_factor, k_factor


def _factors(x_q: Tensor, x_k: Tensor, weight: Tensor, unit: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = weight[(None,) * max(0, 2 - weight.dim())]
    (n_q, d), n_k, heads = x_q.shape[-2:], x_k.shape[-2], weight.shape[-2]
    batch = _joint(x_q.shape[:-2], x_k.shape[:-2])
    q_batch = _joint(batch, weight.shape[:-2])
    if unit is not None:
        batch = q_batch  # columns of keys depend on the weights
    exact = torch.promote_types(torch.promote_types(x_q.dtype, x_k.dtype), torch.promote_types(dtype, torch.float32))
    columns = d + 2 if unit is None else padded(HALVES * (d + 2))
    width = plan.power_of_2(d + 2)
    rows = max(ENTRIES // width, 1)
    sides = 1 if x_k is x_q else 2
    shares = min(SHARES, rows)
    parts = sides * min(shares, plan.cdiv(max(n_q, n_k), rows))
    box = room(x_q, (*batch, BOX.value, parts * d), exact)
    heaviest = None if unit is None else room(x_q, (*batch, parts), torch.float32)
    q, k = _folded(x_q, batch), _folded(x_k, batch)
    w = _folded(weight if weight.shape[-1] == n_q else weight.expand(*weight.shape[:-1], n_q), q_batch)
    points = {"x_q": q, "x_k": k, "weight": w, "heaviest": heaviest, "n_q": n_q, "n_k": n_k, "n_heads": heads}
    points |= _strides(q, "q_batch", "q_row", "q_column")
    points |= _strides(k, "k_batch", "k_row", "k_column")
    points |= _strides(w, "w_batch", "w_head", "w_row")
    launch_known(
        box_kernel, (batch.numel(), parts), x_q.device, points | {"box": box},
        SIDES=sides, D=d, WIDTH=width, ROWS=rows, WEIGHTS=ENTRIES,
    )  # fmt: skip
    q_factor = room(x_q, (*q_batch, heads, n_q, columns), dtype)
    k_factor = room(x_q, (*batch, 1, n_k, columns), dtype)
    q_box = _folded(box, q_batch)
    if q_batch != batch:
        q = _folded(x_q, q_batch)
        points |= _strides(q, "q_batch", "q_row", "q_column") | {"x_q": q}
    width = plan.power_of_2(columns)
    rows = max(WRITTEN // (1 if unit is None else 2) // width, 1)
    q_programs = q_factor.shape[:-2].numel() * plan.cdiv(n_q, rows)
    launch_known(
        factors_kernel, (q_programs + batch.numel() * plan.cdiv(n_k, rows), 1), x_q.device,
        points
        | {"q_box": q_box, "k_box": box, "b_batch": q_box.stride(0), "q_factor": q_factor,
           "k_factor": k_factor, "n_parts": parts, "q_programs": q_programs, "unit": 1.0 if unit is None else unit},
        D=d, COLUMNS=columns, WIDTH=width, ROWS=rows, BOXES=sides * shares, HALVES=HALVES, Q_LOW=Q_LOW, K_LOW=K_LOW,
    )  # fmt: skip
    return q_factor, k_factor


def _joint(a: torch.Size, b: torch.Size) -> torch.Size:
    """The shape to which both broadcast; torch's own search takes the host as long as a launch."""
    return a if a == b else torch.broadcast_shapes(a, b)


def _folded(x: Tensor, batch: torch.Size) -> Tensor:
    """With all of the batch as one dimension before two others; copied where it does not fold into one."""
    if x.shape[:-2] != batch:
        x = x.expand(*batch, *x.shape[-2:])
    if x.dim() == 3:
        return x
    shape = (-1, *x.shape[-2:])
    try:
        return x.view(shape)
    except RuntimeError:
        return done(Tensor.reshape, x, shape)


def _strides(x: Tensor, *names: str) -> dict[str, int]:
    return dict(zip(names, x.stride(), strict=True))


@triton.jit
def load_points(x, row, column, o_n, n, o_d, D: tl.constexpr):
    """Coordinates `o_d` of points: behind the last point its own, behind the last coordinate zeros."""
    p_x = x + tl.minimum(o_n, n - 1).to(tl.int64) * row + o_d.to(tl.int64) * column
    return tl.load(p_x, mask=o_d < D, other=0.0)


@triton.jit
def store_box(
    x, row, column, n, i_share, n_shares, p_box, n_parts, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The box around a share of the points; what is not finite makes one without end."""
    o_d = tl.arange(0, WIDTH)
    b_low = tl.full([ROWS, WIDTH], float("inf"), p_box.dtype.element_ty)
    b_high = -b_low
    b_most = tl.zeros([ROWS, WIDTH], p_box.dtype.element_ty)
    for first in range(i_share * ROWS, n, n_shares * ROWS):
        o_n = first + tl.arange(0, ROWS)[:, None]
        b_x = load_points(x, row, column, o_n, n, o_d[None, :], D).to(b_low.dtype)
        b_low = tl.minimum(b_low, tl.where(b_x == b_x, b_x, -float("inf")))
        b_high = tl.maximum(b_high, tl.where(b_x == b_x, b_x, float("inf")))
        b_most = tl.maximum(b_most, tl.where(tl.abs(b_x) < float("inf"), tl.abs(b_x), 0.0))
    tl.store(p_box + o_d, tl.min(b_low, 0), mask=o_d < D)
    tl.store(p_box + n_parts * D + o_d, tl.max(b_high, 0), mask=o_d < D)
    tl.store(p_box + 2 * n_parts * D + o_d, tl.max(b_most, 0), mask=o_d < D)


@triton.jit(do_not_specialize=["n_q", "n_k", "n_heads", *STRIDES[:-1]])
def box_kernel(
    x_q, x_k, weight, heaviest, box, n_q, n_k, n_heads,
    q_batch, q_row, q_column, k_batch, k_row, k_column, w_batch, w_head, w_row,
    SIDES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Boxes around shares of the points of both sides, or of one, `(batch, 3, parts, d)`.

    And, where wanted, the largest finite magnitudes of shares of the weights, `(batch, parts)`.
    """
    i_b, i_part, n_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    n_shares = n_parts // SIDES
    p_box = box + (i_b * BOX * n_parts + i_part) * D
    if i_part < n_shares:
        store_box(x_q + i_b * q_batch, q_row, q_column, n_q, i_part, n_shares, p_box, n_parts, D, WIDTH, ROWS)
    else:
        i_share = i_part - n_shares
        store_box(x_k + i_b * k_batch, k_row, k_column, n_k, i_share, n_shares, p_box, n_parts, D, WIDTH, ROWS)
    if heaviest is not None:
        b_most = tl.zeros([WEIGHTS], tl.float32)
        for first in range(i_part * WEIGHTS, n_heads * n_q, n_parts * WEIGHTS):
            o_w = first + tl.arange(0, WEIGHTS)
            p_w = weight + i_b * w_batch + (o_w // n_q).to(tl.int64) * w_head + (o_w % n_q).to(tl.int64) * w_row
            b_w = tl.abs(tl.load(p_w, mask=o_w < n_heads * n_q, other=0.0).to(tl.float32))
            b_most = tl.maximum(b_most, tl.where(b_w < float("inf"), b_w, 0.0))
        tl.store(heaviest + i_b * n_parts + i_part, tl.max(b_most, 0))


@triton.jit
def load_box(box, n_parts, o_d, D: tl.constexpr, BOXES: tl.constexpr):
    """The middle of the box, or 0 where it has none, and how far from there points are; coordinates `o_d`."""
    p_box = box + tl.minimum(tl.arange(0, BOXES)[:, None], n_parts - 1) * D + o_d
    b_low = tl.min(tl.load(p_box, mask=o_d < D, other=0.0), 0)[None, :]
    b_high = tl.max(tl.load(p_box + n_parts * D, mask=o_d < D, other=0.0), 0)[None, :]
    b_most = tl.max(tl.load(p_box + 2 * n_parts * D, mask=o_d < D, other=0.0), 0)[None, :]
    b_centre = b_high - (b_high - b_low) * 0.5
    has_centre = tl.abs(b_centre) < float("inf")
    b_far = tl.where(has_centre, tl.maximum(b_high - b_centre, b_centre - b_low), b_most)
    return tl.where(has_centre, b_centre, 0.0), b_far.to(tl.float32)


@triton.jit
def load_balance(heaviest, n_parts, b_far, unit, o_c, o_r, D: tl.constexpr, BOXES: tl.constexpr):
    """By which columns are multiplied and divided, from bounds: how far points are from the middle, the weights."""
    b_square = tl.sum(tl.where(o_c < D, b_far * b_far, 0.0), 1)[:, None]
    b_w = tl.max(tl.load(heaviest + tl.minimum(tl.arange(0, BOXES), n_parts - 1)), 0)
    b_q = b_w * tl.where(o_r < D, b_far, tl.where(o_r == D, 1.0, b_square))
    b_k = tl.where(o_r < D, 2 * b_far, tl.where(o_r == D, b_square, 1.0))
    return balance(invertible(b_q) / unit, invertible(b_k))


@triton.jit
def load_relative(x, row, column, o_n, n, b_centre, o_c, o_r, dtype: tl.constexpr, D: tl.constexpr):
    """Coordinates relative to the middle, and squared lengths."""
    b_r = (load_points(x, row, column, o_n, n, o_r, D).to(b_centre.dtype) - b_centre).to(dtype)
    return b_r, tl.sum(tl.where(o_c < D, b_r * b_r, 0.0), 1)[:, None]


@triton.jit
def in_halves(
    b_factor, b_unit, o_c, dtype: tl.constexpr, RANK: tl.constexpr, HALVES: tl.constexpr, LOW: tl.constexpr
):  # fmt: skip
    """Rows of a factor over a unit, in halves side by side."""
    b_factor = tl.div_rn(b_factor, tl.zeros_like(b_factor) + b_unit)
    return tl.where(o_c < HALVES * RANK, half(b_factor, o_c, dtype, RANK, LOW), 0.0)


@triton.jit
def store_factor(p_factor, b_factor, o_n, n, o_c, COLUMNS: tl.constexpr):
    tl.store(p_factor + o_n.to(tl.int64) * COLUMNS + o_c, b_factor, mask=(o_n < n) & (o_c < COLUMNS))


@triton.jit(do_not_specialize=["n_q", "n_k", "n_heads", "n_parts", "q_programs", "unit", *STRIDES])
def factors_kernel(
    x_q, x_k, weight, heaviest, q_box, k_box, q_factor, k_factor, n_q, n_k, n_heads, n_parts, q_programs, unit,
    q_batch, q_row, q_column, k_batch, k_row, k_column, w_batch, w_head, w_row, b_batch,
    D: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BOXES: tl.constexpr,
    HALVES: tl.constexpr, Q_LOW: tl.constexpr, K_LOW: tl.constexpr,
):  # fmt: skip
    """A block of rows of a factor, `-w (r, 1, |r|^2)` for queries, `(-2 r, |r|^2, 1)` for keys.

    With the `heaviest` weights as columns over `unit`.
    """
    HALVED: tl.constexpr = heaviest is not None
    DTYPE: tl.constexpr = tl.float32 if HALVED else q_factor.dtype.element_ty
    RANK: tl.constexpr = D + 2
    o_c = tl.arange(0, WIDTH)[None, :]
    o_r = o_c % RANK if HALVED else o_c
    if tl.program_id(0) < q_programs:
        n_blocks = tl.cdiv(n_q, ROWS)
        i_bh, i_block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
        i_b, i_h = i_bh // n_heads, i_bh % n_heads
        o_n = i_block * ROWS + tl.arange(0, ROWS)[:, None]
        b_centre, b_far = load_box(q_box + i_b * b_batch, n_parts, o_r, D, BOXES)
        b_r, b_square = load_relative(x_q + i_b * q_batch, q_row, q_column, o_n, n_q, b_centre, o_c, o_r, DTYPE, D)
        p_w = weight + i_b * w_batch + i_h * w_head + o_n.to(tl.int64) * w_row
        b_w = tl.load(p_w, mask=o_n < n_q, other=0.0).to(DTYPE)
        b_factor = -b_w * tl.where(o_r < D, b_r, tl.where(o_r == D, 1.0, b_square))
        if HALVED:
            b_balance = load_balance(heaviest + i_b * n_parts, n_parts, b_far, unit, o_c, o_r, D, BOXES)
            b_unit = tl.div_rn(tl.zeros_like(b_balance) + unit, b_balance)
            b_factor = in_halves(b_factor, b_unit, o_c, q_factor.dtype.element_ty, RANK, HALVES, Q_LOW)
        store_factor(q_factor + i_bh * n_q * COLUMNS, b_factor, o_n, n_q, o_c, COLUMNS)
    else:
        n_blocks = tl.cdiv(n_k, ROWS)
        i = tl.program_id(0) - q_programs
        i_b, i_block = (i // n_blocks).to(tl.int64), i % n_blocks
        o_n = i_block * ROWS + tl.arange(0, ROWS)[:, None]
        b_centre, b_far = load_box(k_box + i_b * BOX * n_parts * D, n_parts, o_r, D, BOXES)
        b_r, b_square = load_relative(x_k + i_b * k_batch, k_row, k_column, o_n, n_k, b_centre, o_c, o_r, DTYPE, D)
        b_factor = tl.where(o_r < D, -2 * b_r, tl.where(o_r == D, b_square, 1.0))
        if HALVED:
            b_unit = load_balance(heaviest + i_b * n_parts, n_parts, b_far, unit, o_c, o_r, D, BOXES)
            b_factor = in_halves(b_factor, b_unit, o_c, k_factor.dtype.element_ty, RANK, HALVES, K_LOW)
        store_factor(k_factor + i_b * n_k * COLUMNS, b_factor, o_n, n_k, o_c, COLUMNS)
