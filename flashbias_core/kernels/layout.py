"""From tensors of any batch dimensions and strides to the blocks that kernels read: two batch dimensions and heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from flashbias.errors import UnsupportedError

from .geometry import Geometry, geometry
from .replay import contiguous, done, reduced
from .terms import Block

TILE_ROWS = 128  # at most


class Axes(NamedTuple):
    """Which dimensions a tensor has behind those of the batch."""

    head: bool = True
    row: bool = True
    column: bool = True


class Layout:
    """How the batch dimensions of one call fold into two, `outer` and `inner`.

    Neighbouring dimensions fold into one where every tensor's strides allow it, so that what is broadcast over some
    of them is read in place.

    Args:
        batch: the batch dimensions of the scores.
        heads: the number of query heads.
        vectors: tensors that may be copied where they do not fold, `(*batch, ...)` with the dimensions of their axes.
        matrices: those that may not, since they grow with N^2.

    Raises:
        UnsupportedError: where a matrix would need three batch dimensions.
    """

    def __init__(
        self,
        batch: Sequence[int],
        heads: int,
        vectors: Sequence[tuple[Geometry, Axes]],
        matrices: Sequence[tuple[Geometry, Axes]],
    ) -> None:
        self.batch, self.heads = tuple(batch), heads
        self.split = max(len(self.batch) - 1, 0)
        if len(self.batch) > 2:
            self.split = self._fold(vectors, matrices)
        self.outer, self.inner = prod(self.batch[: self.split]), prod(self.batch[self.split :])
        self.strides = lru_cache(maxsize=64)(self._strides)

    def _fold(self, vectors: Sequence[tuple[Geometry, Axes]], matrices: Sequence[tuple[Geometry, Axes]]) -> int:
        """The place between batch dimensions before which they fold into `outer`, and behind it into `inner`."""
        fixed = set().union(*(self._breaks(self._steps(*matrix)) for matrix in matrices))
        splits = fixed.union(*(self._breaks(self._steps(*vector)) for vector in vectors))
        if len(splits) > 1:
            if len(fixed) > 1:
                raise UnsupportedError(
                    f"values or a mask over pairs that broadcast over batch dimensions {self.batch} in a pattern of "
                    f"{len(fixed) + 1} groups",
                    "a pattern of at most two groups of neighbouring batch dimensions",
                    "permute the batch dimensions so that those of size 1 stand together, or expand one of them",
                )
            splits = fixed or {min(splits)}
        return min(splits, default=0)

    def _steps(self, known: Geometry, axes: Axes) -> list[int]:
        """Strides over all dimensions `(*batch, ...)`; zero over those that broadcast: missing, or of size 1."""
        steps = [0 if size == 1 else stride for size, stride in zip(known.shape, known.stride, strict=True)]
        return [0] * (len(self.batch) + sum(axes) - len(steps)) + steps

    def _breaks(self, steps: Sequence[int]) -> set[int]:
        """The places between batch dimensions that may not be folded."""
        sizes = [(d, size) for d, size in enumerate(self.batch) if size != 1]
        return {right for (left, _), (right, size) in pairwise(sizes) if steps[left] != steps[right] * size}

    def _strides(self, known: Geometry, axes: Axes) -> tuple[int, int, int, int] | None:
        """Strides over outer batch, inner batch, head and row; None where the tensor has to be copied first."""
        if axes.column and known.stride[-1] != 1 and known.shape[-1] > 1:
            return None
        steps = self._steps(known, axes)
        if len(self.batch) > 2 and self._breaks(steps) - {self.split}:
            return None
        outer = inner = 0
        for d, size in enumerate(self.batch):
            if size != 1 and d < self.split:
                outer = steps[d]
            elif size != 1:
                inner = steps[d]
        rest = len(self.batch)
        head = steps[rest] if axes.head else 0
        row = steps[rest + axes.head] if axes.row else 0
        return None if _are_far_apart(row, known, axes) else (outer, inner, head, row)

    def block(self, tensor: Tensor, axes: Axes = Axes()) -> Block:  # noqa: B008 - it cannot be changed
        """The block of a tensor, copied where it has to be."""
        strides = self.strides(Geometry(*geometry(tensor)), axes)
        if strides is None:
            tensor = contiguous(tensor)
            strides = self.strides(Geometry(*geometry(tensor)), axes)
        if strides is None:  # broadcast over some of the dimensions that fold
            tensor = done(_expanded, tensor, self.batch, sum(axes))
            strides = self.strides(Geometry(*geometry(tensor)), axes)
        assert strides is not None
        return Block(tensor, *strides)

    def sizes(self, tensor: Tensor) -> tuple[int, int, int]:
        """The sizes that `tensor`, `(*batch, H, rows, columns)`, itself has in outer batch, inner batch and heads."""
        own = (1,) * (len(self.batch) + 3 - tensor.dim()) + tuple(tensor.shape)
        return prod(own[: self.split]), prod(own[self.split : len(self.batch)]), own[-3]

    def unfolded(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The shape `(*batch, H)` of what has these sizes in outer and inner batch, all of them or 1, and heads."""
        outer, inner, heads = sizes
        before = self.batch[: self.split] if outer == self.outer else (1,) * self.split
        behind = self.batch[self.split :] if inner == self.inner else (1,) * (len(self.batch) - self.split)
        return *before, *behind, heads


def _are_far_apart(step: int, known: Geometry, axes: Axes) -> bool:
    """Whether rows, which could be closer, are too many elements apart for kernels, which count in 32 bits within a
    tile and within a vector."""
    if not axes.row:
        return False
    rows, least = (TILE_ROWS, known.shape[-1]) if axes.column else (known.shape[-1], 1)
    return step > least and step * rows >= 2**31


def _expanded(tensor: Tensor, batch: tuple[int, ...], trailing: int) -> Tensor:
    """A copy for each of the batch of what has so many dimensions behind it."""
    tensor = tensor[(None,) * (trailing - tensor.dim())]
    return tensor.expand((*batch, *tensor.shape[tensor.dim() - trailing :])).contiguous()


def reduce_to(gradient: Tensor | None, shape: torch.Size) -> Tensor:
    """The gradient `(*batch, ...)` summed over what was broadcast from `shape`."""
    assert gradient is not None
    return gradient if gradient.shape == shape else reduced(Tensor.sum_to_size, gradient, shape)
