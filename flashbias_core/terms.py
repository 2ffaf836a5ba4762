"""The closed set of what the kernels add to the scores. Biases (an open set) describe themselves in these terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Problem:
    """What a bias may need to know about the call that it is part of.

    `batch`, `heads`, `n_q`, `n_k`: sizes of the scores `(*batch, heads, n_q, n_k)`.
    `offset`: of the causal diagonal, an integer or a tensor `(*batch,)`; `n_k - n_q` without a causal mask.
    `q_counts`, `k_counts`: booleans `(*batch, n_q)`, `(*batch, n_k)`, False where a mask leaves the position out
    of every row or column, so that what stands there means nothing; None where all positions count.
    """

    batch: tuple[int, ...]
    heads: int
    n_q: int
    n_k: int
    offset: int | Tensor
    device: torch.device
    q_counts: Tensor | None = None
    k_counts: Tensor | None = None


@dataclass
class Rank:
    """`B_ij = q_factor[i] . k_factor[j]`, factors `(*batch, H, N, R)`, batch and head dimensions broadcast."""

    q_factor: Tensor
    k_factor: Tensor


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
