"""A bias given by two thin factors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flashbias.checks import check_broadcast, check_floating, check_last
from flashbias.errors import ShapeError
from flashbias.terms import Problem, Rank, Term

from .base import Bias


class FactoredBias(Bias):
    """`B_ij = q_factor[i] . k_factor[j]` (Wu et al., FlashBias, 2025, equation 3).

    Args:
        q_factor, k_factor: `(*batch, H, Nq, R)` and `(*batch, H, Nk, R)`, batch and head dimensions broadcast, any
            floating dtype; fp32 factors keep their accuracy beside half-precision queries. Differentiable.

    Raises:
        ShapeError, DtypeError: for factors that cannot be used.
    """

    def __init__(self, q_factor: Tensor, k_factor: Tensor) -> None:
        check_floating("q_factor", q_factor)
        check_floating("k_factor", k_factor)
        if q_factor.dim() < 2 or k_factor.dim() < 2 or q_factor.shape[-1] != k_factor.shape[-1]:
            raise ShapeError(
                f"factors of shapes {tuple(q_factor.shape)} and {tuple(k_factor.shape)}",
                "(*batch, H, Nq, R) and (*batch, H, Nk, R) with one R",
                "put the rank into the last dimension of both",
            )
        self.q_factor, self.k_factor = q_factor, k_factor

    def dense(
        self, n_q: int, n_k: int, *, offset: int | Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self.q_factor.to(dtype) @ self.k_factor.to(dtype).mT

    def terms(self, problem: Problem) -> Iterable[Term]:
        if self.q_factor.shape[-1] == 0:
            return []
        sides = (("q_factor", self.q_factor, problem.n_q, "Nq"), ("k_factor", self.k_factor, problem.n_k, "Nk"))
        for name, factor, n, meaning in sides:
            rank = factor.shape[-1]
            check_last(name, factor, (n, rank), f"({meaning}, R)")
            check_broadcast(name, factor, (*problem.batch, problem.heads, n, rank), f"(*batch, H, {meaning}, R)")
        return [Rank(self.q_factor, self.k_factor)]
