"""How far a result may be from the oracle: bounds derived from what an eager computation reaches."""

from __future__ import annotations

import torch
from torch import Tensor

from .biases import Bias
from .masks import Mask
from .reference import scores_of


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    mask: Mask | Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch whose intermediates have the dtype of query and which adds the bias in fp32.

    Arguments as of `biased_attention`; output in the dtype of query, LSE in fp32. Its error is the measure for ours.
    """
    dtype = query.dtype
    scores, value = scores_of(query, key, value, bias, mask=mask, is_causal=is_causal, scale=scale, dtype=dtype)
    scores = scores.float()
    alive = (scores > -torch.inf).any(-1, keepdim=True)
    lse = torch.logsumexp(torch.where(alive, scores, 0.0), -1, keepdim=True)
    weights = torch.where(alive, torch.softmax(torch.where(alive, scores, 0.0), -1), 0.0)
    return weights.to(dtype) @ value, torch.where(alive, lse, -torch.inf).squeeze(-1)


def assert_as_accurate(name: str, result: Tensor, eager_result: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """Assert `|result - oracle| <= 2 e + 4 eps max(1, |oracle|)` everywhere.

    `e` is the largest error of `eager_result`, `eps` that of `dtype`. Infinite and NaN entries must be the same.
    Raises `AssertionError` with the worst entry.
    """
    assert result.shape == oracle.shape, f"{name}: shape {tuple(result.shape)}, wanted {tuple(oracle.shape)}"
    if result.numel() == 0:
        return
    result, eager_result, oracle = result.detach().double(), eager_result.detach().double(), oracle.detach().double()
    finite = oracle.isfinite()
    same = (result == oracle) | (result.isnan() & oracle.isnan())
    assert bool(same[~finite].all()), f"{name}: infinite or NaN entries differ"
    error = torch.where(finite, (result - oracle).abs(), 0.0)
    measure = torch.where(finite, (eager_result - oracle).abs(), 0.0).nan_to_num(0.0, 0.0, 0.0).max()
    bound = 2 * measure + 4 * torch.finfo(dtype).eps * torch.where(finite, oracle.abs(), 0.0).clamp(min=1.0)
    excess = error / bound
    worst = excess.nan_to_num(torch.inf).max().item()
    assert worst <= 1, f"{name}: {worst:.3g} times the bound (error {error.max():.3g}, eager {measure:.3g})"
