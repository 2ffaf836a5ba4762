"""Factors as the tensor cores take them: exact enough in 16 bits, over the kernels' unit, padded to 16 columns.

A tensor-core product has an inner width of 16 at least, so spare columns cost nothing. An fp32 factor goes into a
high and a low half: `q k ~ q_hi k_hi + q_hi k_lo + q_lo k_hi`, 3 R columns of fp16, good to 2^-21 of the largest
product when a power of two balances the columns of the two sides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias import plan

from .compiled import Known, kind, launch
from .replay import contiguous, done, reduced, room

MIN_WIDTH, MAX_WIDTH = 16, 128
ENTRIES = 2048  # of a tile
NONE = -1
LARGEST = tl.constexpr(65504.0)  # of fp16
# An fp32 factor in halves: so many times its columns, which have low halves in these parts of queries' and keys'.
HALVES, Q_LOW, K_LOW = 3, 2, 1
SHARES = 32  # of the rows, among programs that look for the largest
_COMPILED: dict[Hashable, Known] = {}  # does not grow with the number of lengths


@dataclass
class Columns:
    """Two factors, `(*batch, H, N, R)` each with R a multiple of 16, and whether they are over `unit`."""

    q: Tensor
    k: Tensor
    folded: bool = True


def score_columns(q_factor: Tensor, k_factor: Tensor, dtype: torch.dtype, unit: float) -> Columns:
    """Columns whose product is the bias over `unit` (where folded), beside queries of `dtype`, or in float64."""
    rank, own = q_factor.shape[-1], q_factor.dtype
    if own == torch.float64:
        return _score_columns(done(torch.div, q_factor, unit), k_factor, own, 1.0)  # kernels are given units in fp32
    if dtype == torch.float32:
        return _score_columns(q_factor, k_factor, dtype, unit)
    if own == torch.float32:
        return _score_columns(q_factor, k_factor, torch.float16, unit, HALVES, Q_LOW, K_LOW, balanced=True)
    if own == torch.bfloat16 and math.frexp(unit)[0] == 0.5:  # a power of two; fp16 might overflow
        return _score_columns(q_factor, k_factor, own, unit)
    if own == torch.bfloat16 and _rounded(2 * rank) == _rounded(rank):
        return _score_columns(q_factor, k_factor, own, unit, 2, 1)
    columns = _score_columns(q_factor, k_factor, own, 1.0)
    columns.folded = unit == 1.0
    return columns


def _score_columns(
    q_factor: Tensor, k_factor: Tensor, dtype: torch.dtype, unit: float, parts: int = 1, q_low: int = NONE,
    k_low: int = NONE, *, balanced: bool = False,
) -> Columns:  # fmt: skip
    """Columns over `unit`: high halves of the factor in each of the parts, but low halves in those numbered `low`."""
    rank = q_factor.shape[-1]
    number = parts * rank
    columns = padded(number)
    if rank == 0 or (columns == rank and q_factor.dtype == k_factor.dtype == dtype and unit == 1.0):
        return Columns(q_factor, k_factor)
    q_factor, k_factor = contiguous(q_factor), contiguous(k_factor)
    q, k = (room(factor, (*factor.shape[:-1], columns), dtype) for factor in (q_factor, k_factor))
    n_q, n_k = q_factor.numel() // rank, k_factor.numel() // rank
    width = plan.width(columns)
    rows = max(ENTRIES // width, 1)
    largest = _largest(q_factor, k_factor) if balanced else None
    _launch(
        score_columns_kernel, (plan.cdiv(max(n_q, n_k), rows), 2),
        {"q_factor": q_factor, "k_factor": k_factor, "q": q, "k": k, "largest": largest},
        {"n_q": n_q, "n_k": n_k, "unit": unit},
        RANK=rank, COLUMNS=columns, WIDTH=width, SHARES=SHARES, PARTS=parts, Q_LOW=q_low, K_LOW=k_low, ROWS=rows,
    )  # fmt: skip
    return Columns(q, k)


@dataclass
class GradientColumns:
    """One factor for the product with dS, and how the product's columns give the other factor's gradient."""

    columns: Tensor
    rank: int
    parts: int
    size: Tensor | None

    def room(self, query: Tensor, shape: Sequence[int]) -> Tensor:
        """Room for the product, in fp32, or in float64 as the columns."""
        return room(query, shape, torch.promote_types(self.columns.dtype, torch.float32))

    def combine(self, product: Tensor) -> Tensor:
        """The gradient `(..., R)` from the product `(..., columns)`."""
        if self.parts == 1:
            return product[..., : self.rank]
        return reduced(_added, product, self.rank, self.size)


def _added(product: Tensor, rank: int, size: Tensor | None) -> Tensor:
    total = product[..., :rank] + product[..., rank : 2 * rank]
    return total if size is None else total * size


def padded(number: int) -> int:
    """How many columns the kernels take for so many."""
    return _rounded(number, MIN_WIDTH if number <= MAX_WIDTH else MAX_WIDTH)


def gradient_width(factor: Tensor, dtype: torch.dtype, step: int = MIN_WIDTH) -> int:
    """How many columns `gradient_columns` makes: of an fp32 factor beside 16 bits two parts."""
    return _rounded(_gradient_parts(factor, dtype) * factor.shape[-1], step)


def _gradient_parts(factor: Tensor, dtype: torch.dtype) -> int:
    return 1 if factor.dtype == dtype or dtype == torch.float32 else 2


def gradient_columns(factor: Tensor, dtype: torch.dtype, step: int = MIN_WIDTH) -> GradientColumns:
    """The columns of `factor` beside scores whose gradient has `dtype`, or float64; padded to a multiple of `step`."""
    rank = factor.shape[-1]
    dtype = factor.dtype if factor.dtype == torch.float64 else dtype
    parts, columns = _gradient_parts(factor, dtype), gradient_width(factor, dtype, step)
    if rank == 0 or (columns == rank and factor.dtype == dtype):
        return GradientColumns(factor, rank, 1, None)
    factor = contiguous(factor)
    out = room(factor, (*factor.shape[:-1], columns), dtype)
    sized = parts == 2 and dtype == torch.float16  # whose range is small
    size = room(factor, (rank,), torch.float32) if sized else None
    n_rows, width = factor.numel() // rank, plan.width(columns)
    rows = max(ENTRIES // width, 1)
    largest = _largest(factor) if sized else None
    _launch(
        gradient_columns_kernel, (plan.cdiv(n_rows, rows), 1),
        {"factor": factor, "out": out, "size": size, "largest": largest}, {"n_rows": n_rows},
        RANK=rank, COLUMNS=columns, WIDTH=width, SHARES=SHARES, PARTS=parts, ROWS=rows,
    )  # fmt: skip
    return GradientColumns(out, rank, parts, size)


def _largest(*factors: Tensor) -> Tensor:
    """The largest finite magnitudes in each column of one or two factors, in shares of their rows."""
    first, last = factors[0], factors[-1]
    rank = first.shape[-1]
    largest = room(first, (len(factors), SHARES, rank), torch.float32)
    width = plan.width(rank)
    _launch(
        largest_kernel, (SHARES, len(factors)), {"first": first, "last": last, "largest": largest},
        {"n_first": first.numel() // rank, "n_last": last.numel() // rank},
        RANK=rank, WIDTH=width, ROWS=max(ENTRIES // width, 1),
    )  # fmt: skip
    return largest


def _launch(
    kernel: Any, grid: tuple[int, int], tensors: dict[str, Tensor | None], numbers: dict[str, float], **constants: int
) -> None:
    """Launch one of the kernels below; of the numbers their code depends on nothing but whether 32 bits hold them."""
    device = next(tensor.device for tensor in tensors.values() if tensor is not None)
    long = max(numbers.values()) >= 2**31
    key = (id(kernel), device, long, *map(kind, tensors.values()), *constants.values())
    launch(kernel, grid, tensors | numbers, lambda: constants, _COMPILED, key)


def _rounded(columns: int, step: int = MIN_WIDTH) -> int:
    return -(-columns // step) * step


@triton.jit
def power_of_two(b_x):
    """The power of two next to positive numbers."""
    bits = b_x.to(tl.int32, bitcast=True) + 0x400000
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def invertible(b_largest):
    """Magnitudes in a range that can be inverted."""
    return tl.minimum(tl.maximum(b_largest, 1e-30), 1e30)


@triton.jit
def balance(b_q, b_k):
    """By which columns are multiplied and divided, so that the largest of both sides are alike."""
    return power_of_two(tl.sqrt(b_k) / tl.sqrt(b_q))


@triton.jit
def half(b_x, o_c, dtype: tl.constexpr, RANK: tl.constexpr, LOW: tl.constexpr):
    """High halves, but in the part numbered LOW of the columns low ones.

    Finite numbers that fp16 cannot hold become the largest that it can: sums of infinite halves would be NaN.
    """
    if dtype == tl.float16:
        b_most = tl.where(b_x > 0.0, LARGEST, -LARGEST)
        b_x = tl.where((tl.abs(b_x) > LARGEST) & (tl.abs(b_x) < float("inf")), b_most, b_x)
    b_high = b_x.to(dtype)
    return tl.where(o_c // RANK == LOW, (b_x - b_high.to(tl.float32)).to(dtype), b_high)


@triton.jit
def find_largest(x, n_rows, RANK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The largest finite magnitudes in each column, of every so many rows, `[WIDTH]`."""
    o_r = tl.arange(0, WIDTH)[None, :]
    b_largest = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        o_row = first + tl.arange(0, ROWS)[:, None]
        p_x = x + o_row.to(tl.int64) * RANK + o_r
        b_x = tl.abs(tl.load(p_x, mask=(o_row < n_rows) & (o_r < RANK), other=0.0).to(tl.float32))
        b_largest = tl.maximum(b_largest, tl.where(b_x < float("inf"), b_x, 0.0))
    return tl.max(b_largest, 0)


@triton.jit(do_not_specialize=["n_first", "n_last"])
def largest_kernel(
    first, last, largest, n_first, n_last, RANK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    if tl.program_id(1) == 0:
        b_largest = find_largest(first, n_first, RANK, WIDTH, ROWS)
    else:
        b_largest = find_largest(last, n_last, RANK, WIDTH, ROWS)
    o_r = tl.arange(0, WIDTH)
    i_share = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(largest + i_share * RANK + o_r, b_largest, mask=o_r < RANK)


@triton.jit
def load_largest(largest, o_r, RANK: tl.constexpr, SHARES: tl.constexpr):
    """The largest magnitudes in the columns `o_r` over all shares, in a range that can be inverted."""
    b_shares = tl.load(largest + tl.arange(0, SHARES)[:, None] * RANK + o_r[None, :])
    return invertible(tl.max(b_shares, 0))


@triton.jit
def store_columns(
    x, out, n_rows, b_unit, RANK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    LOW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Halves of `x / unit` side by side, the low one in the part numbered LOW, and zeros."""
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    o_c = tl.arange(0, WIDTH)[None, :]
    inside = (o_row < n_rows) & (o_c < COLUMNS)
    p_x = x + o_row.to(tl.int64) * RANK + o_c % RANK
    b_x = tl.load(p_x, mask=inside & (o_c < PARTS * RANK), other=0.0)
    if out.dtype.element_ty != tl.float64:  # in which all is over 1
        b_x = b_x.to(tl.float32)
        b_x = tl.div_rn(b_x, tl.zeros_like(b_x) + b_unit)
    b_half = half(b_x, o_c, out.dtype.element_ty, RANK, LOW)
    tl.store(out + o_row.to(tl.int64) * COLUMNS + o_c, b_half, mask=inside)


@triton.jit(do_not_specialize=["n_q", "n_k", "unit"])
def score_columns_kernel(
    q_factor, k_factor, q, k, largest, n_q, n_k, unit,
    RANK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr,
    PARTS: tl.constexpr, Q_LOW: tl.constexpr, K_LOW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Columns of both factors, that of the queries over unit; balanced where the largest of their columns are given."""
    b_balance = tl.full([1, WIDTH], 1.0, tl.float32)
    if largest is not None:
        o_r = tl.arange(0, WIDTH) % RANK
        b_q = load_largest(largest, o_r, RANK, SHARES) / unit
        b_k = load_largest(largest + SHARES * RANK, o_r, RANK, SHARES)
        b_balance = balance(b_q, b_k)[None, :]
    b_unit = tl.div_rn(tl.zeros_like(b_balance) + unit, b_balance)
    if tl.program_id(1) == 0:
        store_columns(q_factor, q, n_q, b_unit, RANK, COLUMNS, WIDTH, PARTS, Q_LOW, ROWS)
    else:
        store_columns(k_factor, k, n_k, b_balance, RANK, COLUMNS, WIDTH, PARTS, K_LOW, ROWS)


@triton.jit(do_not_specialize=["n_rows"])
def gradient_columns_kernel(
    factor, out, size, largest, n_rows,
    RANK: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Columns of a factor; over their sizes, powers of two, where the largest of them are given."""
    b_size = tl.full([1, WIDTH], 1.0, tl.float32)
    if largest is not None:
        o_c = tl.arange(0, WIDTH)
        b_size = power_of_two(load_largest(largest, o_c % RANK, RANK, SHARES) / 128)
        tl.store(size + o_c, b_size, mask=o_c < RANK)
        b_size = b_size[None, :]
    store_columns(factor, out, n_rows, b_size, RANK, COLUMNS, WIDTH, PARTS, 1, ROWS)
