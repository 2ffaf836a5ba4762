"""Factors as the tensor cores take them: exact enough in 16 bits, over the kernels' unit, padded to 16 columns.

A tensor-core product has an inner width of 16 at least, so spare columns cost nothing. An fp32 factor goes into a
high and a low half: `q k ~ q_hi k_hi + q_hi k_lo + q_lo k_hi`, 3 R columns of fp16, good to 2^-21 of the largest
product when a power of two balances the columns of the two sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

MIN_WIDTH, MAX_WIDTH = 16, 128


@dataclass
class Columns:
    """Two factors, `(*batch, H, N, R)` each with R a multiple of 16, and whether they are over `unit`."""

    q: Tensor
    k: Tensor
    folded: bool = True


def score_columns(q_factor: Tensor, k_factor: Tensor, dtype: torch.dtype, unit: float) -> Columns:
    """Columns whose product is the bias over `unit` (where folded), beside queries of `dtype`."""
    if dtype == torch.float32:
        return Columns(_padded(q_factor.float() / unit), _padded(k_factor.float()))
    if q_factor.dtype == torch.float32:
        q_factor = q_factor / unit
        balance = _power_of_two((_largest(k_factor) / _largest(q_factor)).sqrt())
        q_high, q_low = _halves(q_factor * balance, torch.float16)
        k_high, k_low = _halves(k_factor / balance, torch.float16)
        return Columns(_padded(q_high, q_high, q_low), _padded(k_high, k_low, k_high))
    if unit == 1.0:
        return Columns(_padded(q_factor), _padded(k_factor))
    if q_factor.dtype == torch.bfloat16:  # fp16 might overflow
        rank = q_factor.shape[-1]
        if math.frexp(unit)[0] == 0.5:
            return Columns(_padded(q_factor / unit), _padded(k_factor))
        if _rounded(2 * rank) == _rounded(rank):
            return Columns(_padded(*_halves(q_factor.float() / unit, torch.bfloat16)), _padded(k_factor, k_factor))
    return Columns(_padded(q_factor), _padded(k_factor), folded=False)


@dataclass
class GradientColumns:
    """One factor for the product with dS, and how the product's columns give the other factor's gradient."""

    columns: Tensor
    rank: int
    parts: int
    size: Tensor | None

    def combine(self, product: Tensor) -> Tensor:
        """The gradient `(..., R)` from the product `(..., columns)` in fp32."""
        total = product[..., : self.rank]
        if self.parts == 2:
            total = total + product[..., self.rank : 2 * self.rank]
        return total if self.size is None else total * self.size


def gradient_columns(factor: Tensor, dtype: torch.dtype, step: int = MIN_WIDTH) -> GradientColumns:
    """The columns of `factor` beside scores whose gradient has `dtype`, padded to a multiple of `step`."""
    rank = factor.shape[-1]
    if factor.dtype == dtype or dtype == torch.float32:
        return GradientColumns(_padded(factor.to(dtype), step=step), rank, 1, None)
    factor, size = factor.float(), None
    if dtype == torch.float16:
        size = _power_of_two(_largest(factor) / 128)
        factor = factor / size
    return GradientColumns(_padded(*_halves(factor, dtype), step=step), rank, 2, size)


def _halves(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = factor.to(dtype)
    return high, (factor - high.float()).to(dtype)


def _largest(factor: Tensor) -> Tensor:
    """The largest magnitude in each column, `(R,)`."""
    sizes = factor.abs().nan_to_num(0.0, 0.0)
    return sizes.amax(tuple(range(factor.dim() - 1))).clamp(min=1e-30, max=1e30)


def _power_of_two(size: Tensor) -> Tensor:
    return torch.exp2(torch.log2(size).round())


def _rounded(columns: int, step: int = MIN_WIDTH) -> int:
    return -(-columns // step) * step


def _padded(*parts: Tensor, step: int | None = None) -> Tensor:
    """The parts side by side, with columns of zeros up to a multiple of `step`.

    By default of 16, or, where one product does not take them all, of the 128 that it takes at most.
    """
    columns = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    number = columns.shape[-1]
    spare = _rounded(number, step or (MIN_WIDTH if number <= MAX_WIDTH else MAX_WIDTH)) - number
    return pad(columns, (0, spare)) if spare else columns
