"""How the output of a call lies in memory: as the queries do, so that hosts need not copy it where they join heads."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

from torch import Tensor


def abreast(query: Tensor) -> bool:
    """Whether the heads of a row lie side by side, `(*batch, N, H, C)` in memory."""
    rows, heads = query.shape[-2], query.shape[-3]
    return rows > 1 and heads > 1 and query.stride(-2) > query.stride(-3)


def new_output(query: Tensor, c_v: int) -> Tensor:
    """An output `(*batch, H, N, Cv)` without content, in the dtype of the queries."""
    *batch, heads, rows, _ = query.shape
    if not abreast(query):
        return query.new_empty((*batch, heads, rows, c_v))
    # Not transposed: of a view, results of a function of autograd may not be changed in place.
    sizes = c_v, heads, rows, *reversed(batch)
    columns, head, row, *outer = accumulate(sizes[:-1], mul, initial=1)
    return query.new_empty_strided((*batch, heads, rows, c_v), (*outer[::-1], head, row, columns))
