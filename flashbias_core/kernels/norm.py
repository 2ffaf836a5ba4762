"""Layer norm of the last dimension, for the few channels of a pair representation, and no gradients.

A program normalises several rows at once. torch gives every row a block of threads, most of which have nothing to do
with 128 channels. Rows are read at any strides: what is turned around needs no copy before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias import plan

from .known import launch_known
from .replay import repeated, room

MAX_CHANNELS = 512
ENTRIES = 4096  # of a tile
MAX_BATCH = 65535  # that the second dimension of a grid can have


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of x `(..., C)`, C at most `MAX_CHANNELS`, in its dtype, fp16, bf16 or fp32; contiguous.

    Sums are in fp32. Weight and bias `(C,)` are contiguous and are rounded to the dtype of x before.
    """
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (out,) = repeated(("norm", float(eps)), (x, weight, bias), lambda: [_layer_norm(x, weight, bias, float(eps))])
    return out


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    c, out = x.shape[-1], room(x, x.shape)
    rows = x.reshape(1, -1, c) if x.is_contiguous() or x.dim() < 3 else x.reshape(-1, *x.shape[-2:])
    if rows.shape[0] > MAX_BATCH:
        rows = x.reshape(-1, c)[None].contiguous()
    batch, n, _ = rows.shape
    x_batch, x_row, x_column = rows.stride()
    width = plan.power_of_2(c)
    tile = max(ENTRIES // width, 1)
    launch_known(
        norm_kernel, (plan.cdiv(n, tile), batch), x.device,
        {"x": rows, "weight": weight, "bias": bias, "out": out, "n": n, "eps": eps,
         "x_batch": x_batch, "x_row": x_row, "x_column": x_column},
        C=c, WIDTH=width, ROWS=tile,
    )  # fmt: skip
    return out


@triton.jit
def load_channels(p_x, o_c, dtype: tl.constexpr, C: tl.constexpr):
    """A value for each channel, rounded to a dtype, in fp32."""
    return tl.load(p_x + o_c, mask=o_c < C, other=0.0).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["n", "eps"])
def norm_kernel(
    x, weight, bias, out, n, eps, x_batch, x_row, x_column,
    C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of the n rows of one of the batch, with mean 0 and variance 1, times the weight, plus the bias."""
    i_b = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.arange(0, WIDTH)[None, :]
    inside = (o_row < n) & (o_c < C)
    o_row = o_row.to(tl.int64)
    p_x = x + i_b * x_batch + o_row * x_row + o_c.to(tl.int64) * x_column
    b_x = tl.load(p_x, mask=inside, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, 1)[:, None] / C
    b_x = tl.where(inside, b_x - b_mean, 0.0)
    b_variance = tl.sum(b_x * b_x, 1)[:, None] / C
    b_x = b_x * tl.rsqrt(b_variance + eps)
    if weight is not None:
        b_x = b_x * load_channels(weight, o_c, x.dtype.element_ty, C)
    if bias is not None:
        b_x = b_x + load_channels(bias, o_c, x.dtype.element_ty, C)
    tl.store(out + (i_b * n + o_row) * C + o_c, b_x.to(out.dtype.element_ty), mask=inside)
