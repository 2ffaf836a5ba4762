"""Calls of the operator that share bias, mask and scale, as those of a model's layers do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .attention import biased_attention
from .biases import Bias
from .direct import is_unheard
from .kernels.geometry import geometry
from .masks import Mask


class Prepared:
    """`biased_attention(query, key, value, bias, mask=mask, scale=scale)`, for many calls of which most are alike.

    Without gradients, a call whose tensors lie in memory as those of the last one did is made again at once: of all
    that it depends on only these three are looked at. So is the first, where the operator has made one like it.
    Bias and mask, and the tensors in them, must stay what they are.
    """

    def __init__(self, bias: Bias | None, mask: Mask | None, scale: float | None) -> None:
        self.bias, self.mask, self.scale = bias, mask, scale
        self._known: tuple[list[Any], ops.Way | None, list[Tensor]] = [], None, []  # one, for other threads

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Output `(*batch, H, Nq, Cv)`; arguments and errors as of `biased_attention`."""
        own = query, key, value
        if torch.is_grad_enabled() or not is_unheard(own) or not ops.is_plain("cuda" if query.is_cuda else "cpu"):
            return self._attend(own)
        lie = [(*geometry(x), x.get_device()) for x in own]
        known, way, others = self._known
        if way is None or lie != known:
            parts = *own, self.bias, self.mask, False, self.scale, 1  # as `biased_attention` has them without an LSE
            way, tensors = ops.known_way(parts)
            others = tensors[len(own) :]
            self._known = lie, way, others
        return self._attend(own) if way is None else way((*own, *others))[0]

    def _attend(self, own: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        out = biased_attention(*own, self.bias, mask=self.mask, scale=self.scale)
        assert isinstance(out, Tensor)
        return out
