"""Gradients of what a bias has for single scores: of a dense one, and of a table by distance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashbias import plan
from flashbias.diagonals import fold, sum_diagonals
from flashbias.operands import Operands

from .call import Call
from .layout import reduce_to
from .replay import room
from .table import table_kernel
from .terms import BAND as TABLE_BAND
from .values import sum_parts_kernel, values_kernel

SUM_ENTRIES = 1024
BAND = TABLE_BAND.value
BAND_BYTES = 1 << 28  # of bands of dS in memory at a time


def values_gradient(
    query: Tensor, n_k: int, values: Tensor, dtype: torch.dtype, call: Call, statistics: dict[str, Any],
    unit_rest: float | None,
) -> Tensor:  # fmt: skip
    """The gradient of a dense bias, in its shape: one program sums one tile over all that shares it.

    With `unit_rest`, what fp32 leaves of the unit, from scores in float64.
    """
    layout, n_q = call.frame.layout, query.shape[-2]
    own = layout.sizes(values)
    shared = [full // size for full, size in zip((layout.outer, layout.inner, layout.heads), own, strict=True)]
    one_row = values.shape[-2] == 1 and n_q > 1
    teams = call.teams("values", query)
    if teams:
        from . import hopper_values

        programs = plan.values_programs(teams, n_q, n_k) * own[-1]
        splits = plan.values_splits(teams, programs, math.prod(shared), query.device)
        planes = room(query, (splits, own[-1], n_q, n_k), torch.float32)
        if hopper_values.backward(call, teams, statistics, planes):
            return _sum_of_parts(planes, values.shape, dtype, call)
    tiles = call.tiles("values" if unit_rest is None else "double values", query)
    n_m, n_n = plan.cdiv(n_q, tiles.block_m), plan.cdiv(n_k, tiles.block_n)
    programs = math.prod(own) * n_n * (1 if one_row else n_m)
    members = math.prod(shared) * (n_m if one_row else 1)
    splits = plan.splits(programs, members, query.device)
    planes = room(query, (splits, *own, values.shape[-2], n_k), torch.float32)
    call.launch(
        values_kernel, (programs * splits, 1), tiles, d_values=planes, n_outer_shared=shared[0],
        n_inner_shared=shared[1], n_heads_shared=shared[2], n_splits=splits, ONE_ROW=one_row, unit_rest=unit_rest,
        **statistics,
    )  # fmt: skip
    return _sum_of_parts(planes, values.shape, dtype, call)


def _sum_of_parts(parts: Tensor, shape: torch.Size, dtype: torch.dtype, call: Call) -> Tensor:
    """The sum over the first dimension, in that shape and dtype."""
    n_parts, n = parts.shape[0], shape.numel()
    if n_parts == 1 and dtype == parts.dtype:
        return parts.view(shape)
    out = room(parts, shape, dtype)
    call.launch(
        sum_parts_kernel, (plan.cdiv(n, SUM_ENTRIES), 1), parts=parts, out=out, n=n, n_parts=n_parts, BLOCK=SUM_ENTRIES
    )
    return out


def table_gradient(
    query: Tensor, n_k: int, operands: Operands, far: tuple[Tensor | None, ...], call: Call,
    statistics: dict[str, Any], unit_rest: float | None,
) -> Tensor:  # fmt: skip
    """The gradient of a table by distance, in its shape; `far` are the sums `(*batch, H)` beyond its reach.

    `unit_rest`: as above.
    """
    table, layout, n_q = operands.table, call.frame.layout, query.shape[-2]
    assert table is not None
    full = layout.outer, layout.inner, layout.heads
    own = [size if size == 1 else most for size, most in zip(layout.sizes(table.unsqueeze(-2)), full, strict=True)]
    offset = operands.offset if operands.offsets is None else operands.offsets[..., None]
    if isinstance(offset, Tensor):  # which columns are near is then a batch's own
        own[:2] = full[:2]
    shared = [most // size for most, size in zip(full, own, strict=True)]
    reach, last_band = table.shape[-1] // 2, (n_q - 1) // BAND * BAND
    near = offset - reach + 1 & -BAND
    near = near.clamp(min=-last_band) if isinstance(near, Tensor) else max(near, -last_band)
    # As many columns as `near_keys` has at any offset; under a causal mask those behind are not attended to.
    width = plan.cdiv(min((1 if operands.causal else 2) * reach + 3 * BAND, n_k + last_band), BAND) * BAND
    double = unit_rest is not None
    dtype = torch.float64 if double else torch.float32
    step = max(BAND_BYTES // (dtype.itemsize * math.prod(own) * BAND**2), 1) * BAND
    tiles = call.tiles("double values" if double else "values", query)
    total = torch.zeros(table.shape, dtype=torch.float64, device=table.device)
    for start in range(0, width, step):
        columns = min(step, width - start)
        programs = math.prod(own) * (BAND // tiles.block_m) * (columns // tiles.block_n)
        splits = plan.splits(programs, math.prod(shared) * plan.cdiv(n_q, BAND), query.device)
        bands = room(query, (splits, *own, BAND, columns), dtype)
        call.launch(
            table_kernel, (programs * splits, 1), tiles, d_bands=bands, n_outer_shared=shared[0],
            n_inner_shared=shared[1], n_heads_shared=shared[2], n_splits=splits, start=start, width=columns,
            unit_rest=unit_rest, **statistics,
        )  # fmt: skip
        sums = sum_diagonals(bands.sum(0)).reshape(*layout.unfolded(own), -1)
        total += reduce_to(fold(sums.double(), near + start - (BAND - 1) - offset, table.shape[-1]), table.shape)
    for place, rows in ((0, far[0]), (-1, far[1])):
        total[..., place] += reduce_to(rows, table.shape[:-1])
    return total
