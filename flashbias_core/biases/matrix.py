"""A bias given as a matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flashbias.checks import check_broadcast, check_floating, check_last
from flashbias.errors import ShapeError
from flashbias.terms import Problem, Term, Tile

from .base import Bias


class DenseBias(Bias):
    """`B_ij = values[..., i, j]`, read tile by tile and never expanded.

    Args:
        values: `(*batch, H, Nq or 1, Nk)`, batch and head dimensions broadcast, any floating dtype; entries may be
            `-inf`. Differentiable; the gradient is summed over what was broadcast, without atomics.

    Raises:
        ShapeError, DtypeError: for values that cannot be used.
    """

    def __init__(self, values: Tensor) -> None:
        check_floating("values", values)
        if values.dim() < 2:
            raise ShapeError(
                f"values of shape {tuple(values.shape)}",
                "(*batch, H, Nq or 1, Nk)",
                "give the values a dimension for the queries",
            )
        self.values = values

    def dense(
        self, n_q: int, n_k: int, *, offset: int | Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self.values.to(dtype).expand(*self.values.shape[:-2], n_q, n_k)

    def terms(self, problem: Problem) -> Iterable[Term]:
        check_last("values", self.values, (problem.n_k,), "(Nk,)")
        shape = (*problem.batch, problem.heads, problem.n_q, problem.n_k)
        check_broadcast("values", self.values, shape, "(*batch, H, Nq, Nk)")
        return [Tile(self.values)]
