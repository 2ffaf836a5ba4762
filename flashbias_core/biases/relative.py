"""A bias by relative position, learned entry by entry (Shaw et al., 2018; Raffel et al., T5, 2020, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flashbias.checks import check_broadcast, check_floating
from flashbias.errors import ShapeError
from flashbias.terms import Problem, Table, Term

from .base import Bias


class RelativePositionBias(Bias):
    """`B_ij = table[..., clamp(p_j - p_i, -(D - 1), D - 1) + D - 1]`, for any length.

    Positions are ALiBi's: `p_j = j` and `p_i = i + offset`, where offset is that of the causal mask (`Nk - Nq` unless
    it says otherwise; also a tensor, one for each element of the batch), so that the last query stands at the last
    key. Entry `D - 1` is that of distance 0, behind it stand those of keys to come; the first and the last entry serve
    all that is farther. T5's buckets, expanded, are a table of `D = max_distance + 1`.

    Args:
        table: `(H, 2 D - 1)` or `(*batch, H, 2 D - 1)`, batch and head dimensions broadcast, any floating dtype, used
            in fp32. Differentiable; the gradient is summed in a fixed order, without atomics.

    Raises:
        ShapeError, DtypeError: for a table that cannot be used.
    """

    def __init__(self, table: Tensor) -> None:
        check_floating("table", table)
        if table.dim() < 1 or table.shape[-1] % 2 == 0:
            raise ShapeError(
                f"table of shape {tuple(table.shape)}",
                "(*batch, H, 2 D - 1), an odd number of distances",
                "give the table an entry for each distance from -(D - 1) to D - 1",
            )
        self.table = table

    def dense(
        self, n_q: int, n_k: int, *, offset: int | Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        device, reach = self.table.device, self.table.shape[-1] // 2
        offset = n_k - n_q if offset is None else offset
        if isinstance(offset, Tensor):
            offset = offset[..., None, None]
        distance = torch.arange(n_k, device=device) - torch.arange(n_q, device=device)[:, None] - offset
        index = distance.clamp(-reach, reach) + reach  # (*batch, n_q, n_k)
        if index.dim() == 2:
            return self.table.to(dtype)[..., index]
        rows = self.table.to(dtype)[(None,) * max(0, index.dim() - self.table.dim())]
        return torch.take_along_dim(rows.unsqueeze(-2), index.unsqueeze(-3), -1)

    def terms(self, problem: Problem) -> Iterable[Term]:
        shape = (*problem.batch, problem.heads, self.table.shape[-1])
        check_broadcast("table", self.table, shape, "(*batch, H, 2 D - 1)")
        return [Table(self.table.float())]
