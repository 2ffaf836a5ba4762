"""The operator: `softmax(scale * Q K^T + B) V`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .biases import Bias, DenseBias, FactoredBias
from .checks import check_tensor
from .direct import AUTOCAST
from .errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from .masks import Both, Causal, Mask, as_mask
from .operands import gather

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None = None,
    *,
    mask: Mask | Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with an additive bias, `softmax(scale * query key^T + B) value`.

    Memory grows with the length, not with its square, forward and backward, unless the bias itself is dense.

    Args:
        query: `(*batch, H, Nq, C)`, fp16, bf16 or fp32, any strides, C up to 256.
        key, value: `(*batch, Hkv, Nk, C)` and `(*batch, Hkv, Nk, Cv)` of the same dtype; Hkv divides H, and query
            head h reads head `h // (H / Hkv)`. Batch dimensions broadcast.
        bias: a `Bias`, or a sum of them; added in fp32 whatever the dtype of query.
        mask: a `Mask`, several joined with `&`, or a boolean tensor `(*batch, H, Nq or 1, Nk)`, True where a query
            may attend. Batch and head dimensions of biases and masks may be 1 or missing.
        is_causal: short for `mask=Causal()`, aligned at the bottom right.
        scale: a Python number, `C ** -0.5` by default.
        return_lse: return the logarithm of the softmax's denominator too.

    Returns:
        `(*batch, H, Nq, Cv)` in the dtype of query, with rows or heads side by side in memory as query has them; with
        `return_lse` also the natural logarithm of `sum_j exp(S_ij)`, `(*batch, H, Nq)` fp32. Both are differentiable.
        A row without any key that it may attend to gives 0, an LSE of -inf and zero gradients.

    Raises:
        ShapeError, DtypeError, DeviceError, UnsupportedError: all of them `FlashBiasError`.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
    if isinstance(mask, Tensor):
        check_tensor("mask", mask)
    parts = query, key, value, bias, mask, bool(is_causal), scale
    number = 2 if return_lse else 1  # of results: room for an LSE that nobody reads is kernels' own
    made = ops.like_before(lambda: _attend(*parts)[:number], (*parts, number))
    return (made[0], made[1]) if return_lse else made[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    mask: Mask | Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE; arguments as `biased_attention` has them, checked here."""
    kind = query.device.type
    if kind in AUTOCAST and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (x.to(dtype) if x.dtype in DTYPES else x for x in (query, key, value))
    _check_dtypes(query, key, value)
    query, key, value = _check_shapes(query, key, value)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise DtypeError(
            f"scale of type {type(scale).__name__}",
            "a Python number",
            "pass float(scale), or multiply query by a tensor and pass scale=1.0",
        )
    scale = float(scale)  # also of NumPy's numbers, which launches do not know
    if scale < 0:
        query, scale = -query, -scale
    elif scale == 0:
        query, scale = query * 0, 1.0

    masks = None if mask is None else as_mask(mask)
    if is_causal:
        # Not with `&`, which the compiler of torch 2.7 cannot trace.
        masks = Causal() if masks is None else Both(masks, Causal())
    operands = gather(bias, masks, query.shape[:-3], query.shape[-3], query, key, scale)
    inputs = (query, key, value, *operands.in_order())
    _refuse_tangents(inputs)
    return ops.attend(*inputs, scale)


def flash_bias_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """The signature and layout of the function that came with the FlashBias paper.

    Args:
        q: `(B, Nq, H, C)`; k, v: `(B, Nk, H, C)`.
        q_bias, k_bias: factors `(B or 1, N, H or 1, R)`, both or neither.
        mask: booleans, True where a query may attend, or floats to add to the scores; `(B or 1, H or 1, 1 or Nq, Nk)`.
        causal: attend to keys `j <= i + Nk - Nq`.
        softmax_scale: `C ** -0.5` by default; 0 means 0.

    Returns:
        `(B, Nq, H, Cv)` in the dtype of q.

    Raises:
        As `biased_attention`.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ShapeError(
                f"{name} of shape {tuple(tensor.shape)}", "(B, N, H, C)", "see biased_attention for others"
            )
    if (q_bias is None) != (k_bias is None):
        raise ShapeError("only one of q_bias and k_bias", "both or neither", "pass the other factor too")
    bias: Bias | None = None
    if q_bias is not None and k_bias is not None:
        check_tensor("q_bias", q_bias)
        check_tensor("k_bias", k_bias)
        for name, factor in (("q_bias", q_bias), ("k_bias", k_bias)):
            if factor.dim() < 3:
                raise ShapeError(
                    f"{name} of shape {tuple(factor.shape)}", "(B or 1, N, H or 1, R)", "add the dimensions"
                )
        bias = FactoredBias(q_bias.transpose(-3, -2), k_bias.transpose(-3, -2))
    if mask is not None:
        check_tensor("mask", mask)
    if mask is not None and mask.is_floating_point():
        bias = DenseBias(mask) if bias is None else bias + DenseBias(mask)
        mask = None
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = biased_attention(query, key, value, bias, mask=mask, is_causal=causal, scale=softmax_scale)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _refuse_tangents(inputs: Iterable[Any]) -> None:
    """Raise where forward-mode differentiation would take the derivative for zero."""
    if forward_ad._current_level < 0:
        return
    for value in inputs:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            ops.refuse_forward_mode()


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        raise DtypeError(
            f"query, key and value of {query.dtype}, {key.dtype} and {value.dtype}",
            "one of float16, bfloat16 and float32 for all three",
            "cast them with .to(query.dtype), or use torch.autocast",
        )
    if key.device != query.device or value.device != query.device:
        raise DeviceError(
            f"query, key and value on {query.device}, {key.device} and {value.device}",
            "one device",
            "move them together",
        )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three, with their batch dimensions broadcast."""
    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise _misshapen(query, key, value, "add a dimension for the heads with .unsqueeze(-3)")
    *q_batch, heads, _, c = query.shape
    *k_batch, kv_heads, n_k, c_k = key.shape
    *v_batch, v_heads, n_v, c_v = value.shape
    if (
        c != c_k
        or n_k != n_v
        or kv_heads != v_heads
        or (heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0))
    ):
        raise _misshapen(query, key, value, "check the order of the dimensions: heads stand before positions")
    if not 0 < c <= MAX_HEAD_DIM or not 0 < c_v <= MAX_HEAD_DIM:
        raise UnsupportedError(f"head dimensions {c} and {c_v}", f"1 to {MAX_HEAD_DIM}", "split the heads")
    if q_batch == k_batch == v_batch:
        return query, key, value
    try:
        batch = torch.broadcast_shapes(q_batch, k_batch, v_batch)
    except RuntimeError as error:
        raise _misshapen(query, key, value, "make the batch dimensions equal or 1") from error
    return tuple(tensor.expand(*batch, *tensor.shape[-3:]) for tensor in (query, key, value))  # type: ignore[return-value]


def _misshapen(query: Tensor, key: Tensor, value: Tensor, remedy: str) -> ShapeError:
    return ShapeError(
        f"query, key and value of shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}",
        "(*batch, H, Nq, C), (*batch, Hkv, Nk, C) and (*batch, Hkv, Nk, Cv) where Hkv divides H",
        remedy,
    )
