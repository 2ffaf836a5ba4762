"""ALiBi: a bias linear in the distance of the positions (Press et al., 2022, section 3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flashbias.checks import check_broadcast, check_floating, check_last, check_tensor
from flashbias.errors import DtypeError, ShapeError, UnsupportedError
from flashbias.terms import Linear, Problem, Term

from .base import Bias


class ALiBi(Bias):
    """`B_ij = slope_h * (p_j - p_i)`, or `-slope_h * |p_i - p_j|` when symmetric.

    Args:
        slopes: `(H,)` or `(*batch, H)`, any floating dtype, used in fp32. Differentiable.
        symmetric: take the distance without its sign, for attention to both sides.
        q_positions, k_positions: `(*batch, Nq)` and `(*batch, Nk)`, integers or floats, batch dimensions broadcast.
            Both or neither; by default `p_j = j` and `p_i = i + offset`, where offset is that of the causal mask
            (`Nk - Nq` unless it says otherwise), so that the last query stands at the last key.

    Raises:
        ShapeError, DtypeError, UnsupportedError: for slopes or positions that cannot be used.
    """

    def __init__(
        self,
        slopes: Tensor,
        *,
        symmetric: bool = False,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
    ) -> None:
        check_floating("slopes", slopes)
        if slopes.dim() < 1:
            raise ShapeError("slopes without dimensions", "slopes of shape (H,)", "pass one slope for each head")
        if (q_positions is None) != (k_positions is None):
            raise ShapeError(
                "only one of q_positions and k_positions", "both or neither", "give the positions of the other side too"
            )
        for name, positions in (("q_positions", q_positions), ("k_positions", k_positions)):
            if positions is None:
                continue
            check_tensor(name, positions)
            if positions.dtype == torch.bool or positions.is_complex():
                raise DtypeError(f"{name} of dtype {positions.dtype}", "integers or floats", f"pass {name}.int()")
        self.slopes = slopes
        self.symmetric = bool(symmetric)
        self.q_positions = q_positions
        self.k_positions = k_positions

    def dense(
        self, n_q: int, n_k: int, *, offset: int | Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        if self.q_positions is None or self.k_positions is None:
            device = self.slopes.device
            offset = n_k - n_q if offset is None else offset
            if isinstance(offset, Tensor):
                offset = offset[..., None]
            q_positions = torch.arange(n_q, device=device) + offset
            k_positions = torch.arange(n_k, device=device)
        else:
            q_positions, k_positions = self.q_positions, self.k_positions
        if q_positions.is_floating_point() or k_positions.is_floating_point():
            q_positions, k_positions = q_positions.to(dtype), k_positions.to(dtype)
        else:  # differences of small integers wrap around in their own dtype
            q_positions, k_positions = q_positions.long(), k_positions.long()
        distance = (k_positions[..., None, None, :] - q_positions[..., None, :, None]).to(dtype)
        if self.symmetric:
            distance = -distance.abs()
        return self.slopes.to(dtype)[..., None, None] * distance

    def terms(self, problem: Problem) -> Iterable[Term]:
        check_broadcast("slopes", self.slopes, (*problem.batch, problem.heads), "(*batch, H)")
        if self.q_positions is not None and self.k_positions is not None:
            check_last("q_positions", self.q_positions, (problem.n_q,), "(Nq,)")
            check_last("k_positions", self.k_positions, (problem.n_k,), "(Nk,)")
            check_broadcast("q_positions", self.q_positions, (*problem.batch, problem.n_q), "(*batch, Nq)")
            check_broadcast("k_positions", self.k_positions, (*problem.batch, problem.n_k), "(*batch, Nk)")
            if torch.is_grad_enabled() and (self.q_positions.requires_grad or self.k_positions.requires_grad):
                raise UnsupportedError(
                    "positions that require a gradient", "positions that do not", "pass positions.detach()"
                )
        return [Linear(self.slopes.float(), self.q_positions, self.k_positions, self.symmetric)]
