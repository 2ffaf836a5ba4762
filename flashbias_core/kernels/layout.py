"""From tensors of any batch dimensions and strides to the blocks that kernels read: two batch dimensions and heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from flashbias.errors import UnsupportedError

from .terms import Block


class Layout:
    """How the batch dimensions of one call fold into two, `outer` and `inner`.

    Neighbouring dimensions fold into one where every tensor's strides allow it, so that what is broadcast over some
    of them is read in place.

    Args:
        batch: the batch dimensions of the scores.
        heads: the number of query heads.
        vectors: tensors that may be copied where they do not fold, `(*batch, ...)` with `trailing` other dimensions.
        matrices: those that may not, since they grow with N^2.

    Raises:
        UnsupportedError: where a matrix would need three batch dimensions.
    """

    def __init__(
        self,
        batch: Sequence[int],
        heads: int,
        vectors: Sequence[tuple[Tensor | None, int]],
        matrices: Sequence[tuple[Tensor | None, int]],
    ) -> None:
        self.batch, self.heads = tuple(batch), heads
        self.split = max(len(self.batch) - 1, 0)
        if len(self.batch) > 2:
            self.split = self._fold(vectors, matrices)
        self.outer, self.inner = prod(self.batch[: self.split]), prod(self.batch[self.split :])

    def _fold(self, vectors: Sequence[tuple[Tensor | None, int]], matrices: Sequence[tuple[Tensor | None, int]]) -> int:
        """The place between batch dimensions before which they fold into `outer`, and behind it into `inner`."""
        splits = self._splits(vectors) | self._splits(matrices)
        if len(splits) > 1:
            fixed = self._splits(matrices)
            if len(fixed) > 1:
                raise UnsupportedError(
                    f"values or a mask over pairs that broadcast over batch dimensions {self.batch} in a pattern of "
                    f"{len(fixed) + 1} groups",
                    "a pattern of at most two groups of neighbouring batch dimensions",
                    "permute the batch dimensions so that those of size 1 stand together, or expand one of them",
                )
            splits = fixed or {min(splits)}
        return min(splits, default=0)

    def _splits(self, tensors: Sequence[tuple[Tensor | None, int]]) -> set[int]:
        """The places between batch dimensions that may not be folded."""
        splits = set()
        for tensor, trailing in tensors:
            if tensor is None:
                continue
            strides = self._expanded(tensor, trailing).stride()
            sizes = [(d, size) for d, size in enumerate(self.batch) if size != 1]
            for (left, _), (right, size) in pairwise(sizes):
                if strides[left] != strides[right] * size:
                    splits.add(right)
        return splits

    def _expanded(self, tensor: Tensor, trailing: int) -> Tensor:
        """`tensor` as `(*batch, ...)` with its `trailing` dimensions, of which leading ones may have been missing."""
        tensor = tensor[(None,) * (trailing - tensor.dim())]
        return tensor.expand((*self.batch, *tensor.shape[tensor.dim() - trailing :]))

    def block(self, tensor: Tensor, *, head: bool = True, row: bool = True, column: bool = True) -> Block:
        """The block of a tensor `(*batch, H, rows, columns)`; the flags say which of these it has."""
        trailing = head + row + column
        if column and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            tensor = tensor.contiguous()
        if len(self.batch) > 2:
            tensor = self._expanded(tensor, trailing)
            tensor = tensor.reshape((self.outer, self.inner, *tensor.shape[len(self.batch) :]))
        # Dimensions that are missing, or of size 1, broadcast: a stride of zero.
        strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        strides = [0] * (2 + trailing - len(strides)) + strides
        return Block(tensor, (strides[0], strides[1], strides[2] if head else 0, strides[2 + head] if row else 0))

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


def reduce_to(gradient: Tensor | None, shape: torch.Size) -> Tensor:
    """The gradient `(*batch, ...)` summed over what was broadcast from `shape`."""
    assert gradient is not None
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)
