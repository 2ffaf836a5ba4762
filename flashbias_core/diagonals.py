"""Matrices whose entries depend on the distance between row and column, and gradients that are summed along them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def spread(table: Tensor, first: int | Tensor, rows: int, columns: int) -> Tensor:
    """The matrix `(..., rows, columns)` of a table `(..., 2 D - 1)` by clamped distance.

    `first` `(...)` is the distance of the last row to the first column, the smallest there is.
    """
    reach = table.shape[-1] // 2
    if isinstance(first, Tensor):
        first = first[..., None]
    distance = torch.arange(rows + columns - 1, device=table.device) + first
    index = distance.clamp_(-reach, reach).add_(reach)
    line = torch.take_along_dim(table, index[(None,) * (table.dim() - index.dim())], -1)
    return line.unfold(-1, columns, 1).flip(-2)


def sum_diagonals(matrix: Tensor) -> Tensor:
    """The sums `(..., rows + columns - 1)` along the diagonals of `(..., rows, columns)`, from the last row's first."""
    rows, columns = matrix.shape[-2:]
    # Laid out in lines that are one entry too short, each row stands one place to the right of the one before.
    lines = pad(matrix.flip(-2), (0, rows)).flatten(-2)[..., : rows * (rows + columns - 1)]
    return lines.unflatten(-1, (rows, rows + columns - 1)).sum(-2)


def fold(sums: Tensor, first: int | Tensor, size: int) -> Tensor:
    """The gradient `(..., size)` of a table by clamped distance, from sums `(..., X)` along its diagonals.

    `first` `(...)` is the distance of the first sum; the others follow. Nothing is added by atomics.
    """
    reach, number = size // 2, sums.shape[-1]
    if isinstance(first, Tensor):
        first = first[..., None]
    place = torch.arange(size, device=sums.device) - reach - first
    place = place[(None,) * (sums.dim() - place.dim())]
    inside = (place >= 0) & (place < number)
    gradient = torch.where(inside, torch.take_along_dim(sums, place.clamp(0, number - 1), -1), 0.0)
    distance = torch.arange(number, device=sums.device) + first
    gradient[..., 0] += torch.where(distance < -reach, sums, 0.0).sum(-1)
    gradient[..., -1] += torch.where(distance > reach, sums, 0.0).sum(-1)
    return gradient
