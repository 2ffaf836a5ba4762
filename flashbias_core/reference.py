"""The oracle: attention with a bias by the book, dense, in float64. The only thing that results are compared with."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from .biases import Bias
from .masks import Causal, Mask, as_mask


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    mask: Mask | Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `(*batch, H, Nq, Cv)` and LSE `(*batch, H, Nq)` in float64; arguments as of `biased_attention`.

    Memory grows with Nq * Nk. Differentiable; a row that may attend nowhere gives 0, -inf and zero gradients.
    """
    scores, value = scores_of(query, key, value, bias, mask=mask, is_causal=is_causal, scale=scale, dtype=torch.float64)
    alive = (scores > -torch.inf).any(-1, keepdim=True) | scores.isnan().any(-1, keepdim=True)
    lse = torch.logsumexp(torch.where(alive, scores, 0.0), -1, keepdim=True)
    weights = torch.where(alive, torch.exp(scores - lse), 0.0)
    return weights @ value, torch.where(alive, lse, -torch.inf).squeeze(-1)


def scores_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    *,
    mask: Mask | Tensor | None,
    is_causal: bool,
    scale: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Masked scores `(*batch, H, Nq, Nk)`, and value with its heads repeated, both in at least the given dtype.

    The product of query and key is formed in `dtype`, the bias in float64 when `dtype` is, else in fp32.
    """
    n_q, n_k = query.shape[-2], key.shape[-2]
    group = query.shape[-3] // key.shape[-3]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scores = (query @ key.mT) * scale

    masks = [] if mask is None else list(as_mask(mask).parts())
    masks += [Causal()] if is_causal else []
    if bias is not None:
        offset = _offset(masks, n_q, n_k)
        wide = torch.promote_types(dtype, torch.float32)
        scores = scores + bias.dense(n_q, n_k, offset=offset, dtype=wide)
    for part in masks:
        scores = scores.masked_fill(~part.dense(n_q, n_k, device=query.device), -torch.inf)
    return scores, value


def _offset(masks: list[Mask], n_q: int, n_k: int) -> int | Tensor:
    """The offset of the causal diagonal, the smallest where there are several."""
    offsets = [n_k - n_q if part.offset is None else part.offset for part in masks if isinstance(part, Causal)]
    numbers = [offset for offset in offsets if not isinstance(offset, Tensor)]
    tensors = [offset for offset in offsets if isinstance(offset, Tensor)]
    if not tensors:
        return min(numbers, default=n_k - n_q)
    smallest = reduce(torch.minimum, tensors)
    return smallest.clamp(max=min(numbers)) if numbers else smallest
