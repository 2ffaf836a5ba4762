"""Squared distances between points, weighted per query: the bias of attention on meshes and point clouds.

With `r` the coordinates relative to a common centre, `-w_i |r_i - r_j|^2` is the product of two thin factors,

    phi_q[i] = (2 w_i r_i, -w_i, -w_i |r_i|^2)        phi_k[j] = (r_j, |r_j|^2, 1),

of rank d + 2. Centring keeps the products small wherever the points lie. The last column is constant along a row and
softmax does not see it; it is kept because with it the returned LSE is that of the true bias, and because it gives
the row sums of dS to the coordinates' gradient, whose rounding errors would otherwise be multiplied by |r_i| where
the exact gradient has |r_i - r_j|.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flashbias.checks import check_broadcast, check_device, check_floating, check_last
from flashbias.errors import ShapeError
from flashbias.terms import Problem, Rank, Term

from .base import Bias


class SpatialDistance(Bias):
    """`B_ij = -w_hi * |x_i - x_j|^2`.

    Args:
        x_q, x_k: points `(*batch, Nq, d)` and `(*batch, Nk, d)`, batch dimensions broadcast; fp32 or fp64 to be
            useful (centred in their own dtype, then fp32). Differentiable.
        weight: broadcasts to `(*batch, H, Nq)`, either sign, in 1 / (units of x)^2. Differentiable.

    Raises:
        ShapeError, DtypeError: for points or weights that cannot be used.
    """

    def __init__(self, x_q: Tensor, x_k: Tensor, weight: Tensor) -> None:
        for name, value in (("x_q", x_q), ("x_k", x_k), ("weight", weight)):
            check_floating(name, value)
        if x_q.dim() < 2 or x_k.dim() < 2 or x_q.shape[-1] != x_k.shape[-1] or x_q.shape[-1] == 0:
            raise ShapeError(
                f"points of shapes {tuple(x_q.shape)} and {tuple(x_k.shape)}",
                "(*batch, Nq, d) and (*batch, Nk, d) with one d >= 1",
                "put the coordinates into the last dimension of both",
            )
        self.x_q, self.x_k, self.weight = x_q, x_k, weight

    def dense(
        self, n_q: int, n_k: int, *, offset: int | Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        difference = self.x_q.to(dtype)[..., :, None, :] - self.x_k.to(dtype)[..., None, :, :]
        return -self.weight.to(dtype)[..., None] * difference.square().sum(-1).unsqueeze(-3)

    def terms(self, problem: Problem) -> Iterable[Term]:
        for name, points, n, meaning in (("x_q", self.x_q, problem.n_q, "Nq"), ("x_k", self.x_k, problem.n_k, "Nk")):
            d = points.shape[-1]
            check_device(name, points, problem.device)
            check_last(name, points, (n, d), f"({meaning}, d)")
            check_broadcast(name, points, (*problem.batch, n, d), f"(*batch, {meaning}, d)")
        check_device("weight", self.weight, problem.device)
        check_broadcast("weight", self.weight, (*problem.batch, problem.heads, problem.n_q), "(*batch, H, Nq)")
        centre = _centre(self.x_q, self.x_k, problem)
        r_q = _relative(self.x_q, centre, problem.q_counts)
        r_k = _relative(self.x_k, centre, problem.k_counts)
        weight = self.weight.float()
        weight = weight[(None,) * max(0, 2 - weight.dim())].unsqueeze(-1)  # (..., H, Nq, 1), each of them perhaps 1
        square_q, square_k = r_q.square().sum(-1, keepdim=True), r_k.square().sum(-1, keepdim=True)
        q_factor = torch.cat(_expand(2 * weight * r_q, -weight, -weight * square_q), -1)
        k_factor = torch.cat((r_k, square_k, torch.ones_like(square_k)), -1)
        return [Rank(q_factor, k_factor)]


def _expand(*columns: Tensor) -> list[Tensor]:
    """The columns, broadcast against each other in all but the last dimension."""
    shape = torch.broadcast_shapes(*(column.shape[:-1] for column in columns))
    return [column.expand(*shape, column.shape[-1]) for column in columns]


def _relative(points: Tensor, centre: Tensor, counts: Tensor | None) -> Tensor:
    """Coordinates `(*batch, 1, N, d)` relative to the centre in fp32; zero where a position does not count."""
    relative = (points - centre).float()
    if counts is not None:
        relative = torch.where(counts[..., None], relative, 0.0)
    return relative.unsqueeze(-3)


def _centre(x_q: Tensor, x_k: Tensor, problem: Problem) -> Tensor:
    """The middle of the box around the points that count, `(*batch, 1, d)`. B does not depend on it: no gradient."""
    lows, highs = [], []
    for points, counts in ((x_q.detach(), problem.q_counts), (x_k.detach(), problem.k_counts)):
        low = high = points
        if counts is not None:
            low = torch.where(counts[..., None], points, torch.inf)
            high = torch.where(counts[..., None], points, -torch.inf)
        if points.shape[-2] > 0:
            lows.append(low.amin(-2, keepdim=True))
            highs.append(high.amax(-2, keepdim=True))
    if not lows:
        return x_q.new_zeros(())
    low, high = (torch.minimum(*lows), torch.maximum(*highs)) if len(lows) == 2 else (lows[0], highs[0])
    middle = (low + high) / 2
    return torch.where(middle.isfinite(), middle, 0.0)
