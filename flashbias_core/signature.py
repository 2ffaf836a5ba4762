"""What two calls of the operator have in common that are made in the same way."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from .biases import ALiBi, DenseBias, FactoredBias, RelativePositionBias, SpatialDistance
from .biases.base import Sum
from .masks import Allowed, Both, Causal, KeyPadding, Segments

_PLAIN = {type(None), bool, int, float}
# Others may look at more than their attributes, or compute what kernels read.
_KINDS = {
    ALiBi, DenseBias, FactoredBias, RelativePositionBias, SpatialDistance, Sum,
    Allowed, Both, Causal, KeyPadding, Segments,
}  # fmt: skip


def signature(parts: tuple[Any, ...], tensors: list[Tensor]) -> list[Hashable] | None:
    """All of `parts` but the tensors in them, which are appended to `tensors`.

    Parts are tensors, numbers, None, biases and masks, and tuples of them; None where one is of another kind.
    """
    found: list[Hashable] = []
    for part in parts:
        kind: Any = type(part)
        if kind in _PLAIN:
            found.append(part)
        elif isinstance(part, Tensor):
            tensors.append(part)
            found.append(Tensor)
        elif kind in _KINDS or kind is tuple:
            inner = signature(part if kind is tuple else tuple(vars(part).values()), tensors)
            if inner is None:
                return None
            found += kind, len(inner), *inner
        else:
            return None
    return found
