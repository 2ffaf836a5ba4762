"""The closed set of what the kernels add to the scores. Biases (an open set) describe themselves in these terms."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Problem:
    """What a bias may need to know about the call that it is part of.

    `batch`, `heads`, `n_q`, `n_k`: sizes of the scores `(*batch, heads, n_q, n_k)`.
    `offset`: of the causal diagonal, an integer or a tensor `(*batch,)`; `n_k - n_q` without a causal mask.
    `q_counts`, `k_counts`: booleans `(*batch, n_q)`, `(*batch, n_k)`, False where a mask leaves the position out
    of every row or column, so that what stands there means nothing; None where all positions count.
    `unit`: over which factors in half precision may come, with columns as the kernels take them (`kernels/columns.py`);
    None where they may not.
    `exact`: whether factors are taken in float64: beside queries in fp32.
    """

    batch: tuple[int, ...]
    heads: int
    n_q: int
    n_k: int
    offset: int | Tensor
    device: torch.device
    q_ids: Tensor | None = None
    k_ids: Tensor | None = None
    lengths: Tensor | None = None
    unit: float | None = None
    exact: bool = False
    made: dict[str, Tensor] = field(default_factory=dict)

    # Found where a bias asks for them: most do not, and each would be launches in every call.
    @property
    def q_counts(self) -> Tensor | None:
        if self.q_ids is not None and "q" not in self.made:
            self.made["q"] = self.q_ids != -1
        return self.made.get("q")

    @property
    def k_counts(self) -> Tensor | None:
        if "k" not in self.made:
            if self.lengths is not None:
                self.made["k"] = torch.arange(self.n_k, device=self.device) < self.lengths[..., None]
            if self.k_ids is not None:
                counts = self.k_ids != -1
                self.made["k"] = self.made["k"] & counts if "k" in self.made else counts
        return self.made.get("k")


@dataclass
class Rank:
    """`B_ij = unit * q_factor[i] . k_factor[j]`, factors `(*batch, H, N, R)`, batch and head dimensions broadcast."""

    q_factor: Tensor
    k_factor: Tensor
    unit: float = 1.0


@dataclass
class Linear:
    """`B_ij = slope * (p_j - p_i)`, or `-slope * |p_j - p_i|` when symmetric.

    `slopes` `(*batch, H)` fp32; positions `(*batch, N)`, or None for `p_j = j`, `p_i = i + offset`.
    """

    slopes: Tensor
    q_positions: Tensor | None
    k_positions: Tensor | None
    symmetric: bool


@dataclass
class Tile:
    """`B_ij = values[..., i, j]`, `(*batch, H, Nq or 1, Nk)`, batch and head dimensions broadcast."""

    values: Tensor


@dataclass
class Table:
    """`B_ij = table[..., clamp(j - i - offset, -D + 1, D - 1) + D - 1]`, `(*batch, H, 2 D - 1)` fp32, broadcast."""

    table: Tensor


Term = Rank | Linear | Tile | Table
