"""Squared distances between points, weighted per query: the bias of attention on meshes and point clouds.

With `r` the coordinates relative to a common centre, `-w_i |r_i - r_j|^2` is the product of two thin factors,

    phi_q[i] = -w_i (r_i, 1, |r_i|^2)        phi_k[j] = (-2 r_j, |r_j|^2, 1),

of rank d + 2. Centring keeps the products small wherever the points lie. The last column is constant along a row and
softmax does not see it; it is kept because with it the returned LSE is that of the true bias, and because it gives
the row sums of dS to the coordinates' gradient, whose rounding errors would otherwise be multiplied by |r_i| where
the exact gradient has |r_i - r_j|.

Where points are spread much wider than those that matter to each other, the products are much larger than the distance
that is left of them. Beside queries in fp32 the factors are in float64, therefore, and so are products of few scores.

Each operation of torch costs an eager call a launch: there are few, and points that attend to themselves, the usual
case, are looked at once. Without gradients of points and weights, and where every position counts, two kernels make
the factors (`kernels/points.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashbias import plan
from flashbias.checks import check_broadcast, check_device, check_floating, check_last
from flashbias.direct import has_gradient, is_unheard
from flashbias.errors import ShapeError
from flashbias.terms import Problem, Rank, Term

from .base import Bias

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that kernels read


class SpatialDistance(Bias):
    """`B_ij = -w_hi * |x_i - x_j|^2`.

    Args:
        x_q, x_k: points `(*batch, Nq, d)` and `(*batch, Nk, d)`, batch dimensions broadcast; fp32 or fp64 to be
            useful (centred in their own dtype; relative to the centre in float64 beside queries in fp32, else in
            fp32). Differentiable.
        weight: broadcasts to `(*batch, H, Nq)`, either sign, in 1 / (units of x)^2. Differentiable.

    In fp32, up to 2^23 scores, distances are as good in a box some 10^4 times as wide as points that matter to each
    other are apart as in a small one: on CPUs, and on GPUs with many units of float64 (A100, H100, H200, B200). In half
    precision, on other GPUs, and among more scores, near points in a wide box lose digits: by about the square of its
    width over theirs. There padding that stands elsewhere counts as a part of the box, unless `KeyPadding` or
    `Segments` says that it is padding.

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
        if self._is_for_kernels(problem):
            from flashbias.kernels.points import distance_factors  # not everywhere is there a triton

            factors = distance_factors(self.x_q, self.x_k, self.weight, problem.unit, exact=problem.exact)
            return [Rank(*factors, unit=1.0 if problem.unit is None else problem.unit)]
        centre = _centre(self.x_q, self.x_k, problem)
        dtype = torch.float64 if problem.exact else torch.float32
        queries = keys = _relative(self.x_q, centre, problem.q_counts, dtype)
        if self.x_k is not self.x_q or problem.k_counts is not problem.q_counts:
            keys = _relative(self.x_k, centre, problem.k_counts, dtype)
        weight = self.weight.to(dtype)
        weight = weight[(None,) * max(0, 2 - weight.dim())].unsqueeze(-1)  # (..., H, Nq, 1), each of them perhaps 1
        q_factor = -weight * torch.cat((queries.points, queries.ones, queries.squares), -1)
        k_factor = torch.cat((-2 * keys.points, keys.squares, keys.ones), -1)
        return [Rank(q_factor, k_factor)]

    def _is_for_kernels(self, problem: Problem) -> bool:
        """Whether kernels make the factors, which torch is not told of."""
        tensors = self.x_q, self.x_k, self.weight
        return (
            is_unheard(tensors)
            and not has_gradient(tensors)
            and forward_ad._current_level < 0
            and all(tensor.dtype in _DTYPES and tensor.numel() > 0 for tensor in tensors)
            and plan.backend(problem.device) == "triton"
            and problem.q_counts is None
            and problem.k_counts is None
        )


class _Relative(NamedTuple):
    """Coordinates `(*batch, 1, N, d)` relative to the centre, their squared lengths, and ones."""

    points: Tensor
    squares: Tensor
    ones: Tensor


def _relative(points: Tensor, centre: Tensor, counts: Tensor | None, dtype: torch.dtype) -> _Relative:
    """Points relative to the centre in a dtype; zero where a position does not count."""
    relative = (points.to(torch.promote_types(centre.dtype, dtype)) - centre).to(dtype)
    if counts is not None:
        relative = torch.where(counts[..., None], relative, 0.0)
    relative = relative.unsqueeze(-3)
    squares = relative.square().sum(-1, keepdim=True)
    return _Relative(relative, squares, torch.ones_like(squares))


def _centre(x_q: Tensor, x_k: Tensor, problem: Problem) -> Tensor:
    """The middle of the box around the points that count, `(*batch, 1, d)`. B does not depend on it: no gradient.

    Where a mask says which keys count, the middle of these: queries that are padding, which lengths do not name, may
    stand anywhere, and what distances of others lose is no more than in an eager computation.
    """
    boxes = []
    if x_q.shape[-2] > 0 and (problem.k_counts is None or x_k.shape[-2] == 0):
        boxes.append(_box(x_q.detach(), problem.q_counts))
    if x_k.shape[-2] > 0 and (x_k is not x_q or not boxes):
        boxes.append(_box(x_k.detach(), problem.k_counts))
    if not boxes:
        return x_q.new_zeros(())
    low, high = boxes[0]
    if len(boxes) == 2:
        low, high = torch.minimum(low, boxes[1][0]), torch.maximum(high, boxes[1][1])
    return torch.lerp(low, high, 0.5).nan_to_num(0.0, 0.0, 0.0)


def _box(points: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lowest and the highest coordinates of the points that count, `(*batch, 1, d)` each."""
    if counts is None:
        return torch.aminmax(points, dim=-2, keepdim=True)
    low, high = (torch.where(counts[..., None], points, worst) for worst in (torch.inf, -torch.inf))
    return low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
