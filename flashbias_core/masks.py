"""Where a query may attend. Masks are joined with `&`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_integer, check_tensor
from .errors import DtypeError, ShapeError


class Mask(ABC):
    """A set of pairs (query, key) that attend to each other."""

    @abstractmethod
    def dense(self, n_q: int, n_k: int, *, device: torch.device | str | None = None) -> Tensor:
        """The mask as booleans that broadcast to `(*batch, H, n_q, n_k)`. For tests and pictures."""

    def parts(self) -> Iterator[Mask]:
        """The masks of which this one is the intersection."""
        yield self

    def __and__(self, other: Mask | Tensor) -> Mask:
        return Both(self, as_mask(other))

    __rand__ = __and__


class Both(Mask):
    """The intersection of masks, as `a & b` makes it."""

    def __init__(self, *masks: Mask) -> None:
        self.masks = tuple(part for mask in masks for part in mask.parts())

    def parts(self) -> Iterator[Mask]:
        yield from self.masks

    def dense(self, n_q: int, n_k: int, *, device: torch.device | str | None = None) -> Tensor:
        allowed = torch.ones((), dtype=torch.bool, device=device)
        for mask in self.masks:
            allowed = allowed & mask.dense(n_q, n_k, device=device)
        return allowed


FAR = 2**30  # offsets farther from 0 count as this: kernels add lengths to them in 32 bits


class Causal(Mask):
    """Query i attends to keys `j <= i + offset`.

    Args:
        offset: an integer, a tensor of integers `(*batch,)`, or None for `Nk - Nq` (aligned at the bottom right).
            With a cache of spare capacity: the number of keys that were there before the first query. Beyond 2^30
            from 0 it counts as that.

    Raises:
        DtypeError: for an offset of another type.
    """

    def __init__(self, offset: int | Tensor | None = None) -> None:
        if isinstance(offset, Tensor):
            check_integer("offset", offset)
        elif offset is not None and (isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt))):
            raise DtypeError(
                f"offset of type {type(offset).__name__}", "an integer, a tensor or None", "pass an integer"
            )
        self.offset = max(-FAR, min(offset, FAR)) if isinstance(offset, int) else offset

    def dense(self, n_q: int, n_k: int, *, device: torch.device | str | None = None) -> Tensor:
        offset = n_k - n_q if self.offset is None else self.offset
        if isinstance(offset, Tensor):
            device = offset.device
            offset = offset[..., None, None, None]
        return torch.arange(n_k, device=device) <= torch.arange(n_q, device=device)[:, None] + offset


class KeyPadding(Mask):
    """Every query attends to keys `j < length`; keys beyond are never read.

    Args:
        lengths: integers `(*batch,)`.

    Raises:
        DtypeError: for lengths that are no integers.
    """

    def __init__(self, lengths: Tensor) -> None:
        check_integer("lengths", lengths)
        self.lengths = lengths

    def dense(self, n_q: int, n_k: int, *, device: torch.device | str | None = None) -> Tensor:
        return torch.arange(n_k, device=self.lengths.device) < self.lengths[..., None, None, None]


class Segments(Mask):
    """Queries attend to keys of the same id; an id of -1 attends nowhere.

    Args:
        q_ids, k_ids: integers below 2^31 of shapes `(*batch, Nq)` and `(*batch, Nk)`, batch dimensions broadcast.

    Raises:
        ShapeError, DtypeError: for ids that cannot be used.
    """

    def __init__(self, q_ids: Tensor, k_ids: Tensor) -> None:
        for name, ids in (("q_ids", q_ids), ("k_ids", k_ids)):
            check_integer(name, ids)
            if ids.dim() < 1:
                raise ShapeError(f"{name} without dimensions", "(*batch, N)", "pass an id for each position")
        self.q_ids, self.k_ids = q_ids, k_ids

    def dense(self, n_q: int, n_k: int, *, device: torch.device | str | None = None) -> Tensor:
        q_ids, k_ids = self.q_ids.long()[..., None, :, None], self.k_ids.long()[..., None, None, :]
        return (q_ids == k_ids) & (q_ids != -1)


class Allowed(Mask):
    """Pairs given one by one: booleans `(*batch, H, Nq or 1, Nk)`, batch and head dimensions broadcast."""

    def __init__(self, allowed: Tensor) -> None:
        self.allowed = allowed

    def dense(self, n_q: int, n_k: int, *, device: torch.device | str | None = None) -> Tensor:
        return self.allowed


def as_mask(mask: Mask | Tensor) -> Mask:
    """A mask, from a mask or a boolean tensor. Raises `DtypeError` for anything else."""
    if isinstance(mask, Mask):
        return mask
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise DtypeError(
            f"mask of dtype {mask.dtype}",
            "a boolean tensor, True where a query may attend",
            "pass an additive mask as bias=DenseBias(mask), or mask.bool() if non-zero means attend",
        )
    return Allowed(mask)
