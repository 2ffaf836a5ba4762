"""What takes the place of the host's attention, of its factors of the distances, and of its kernels."""

import sys
from typing import Any

import torch
from torch import Tensor

import flashbias
from flashbias import FactoredBias, biased_attention
from flashbias.errors import ShapeError
from flashbias.integrations import verify
from flashbias.integrations.integration import is_hooked

from .gradients import by_position, in_half, lowered

KERNELS = "layers.flash_bias_triton"
KERNEL_KEPT = "flash_bias_func_before_flashbias"
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "single": torch.float32}
MOST_IN_HALF = 2**16  # points: half precision holds 1 / N in steps of 2^-24, of which bfloat16's eight bits are more


def get_matrix(self: Any, original_pos: Tensor) -> tuple[Tensor, Tensor]:
    """`Model.get_matrix`: factors `(B, N, 1, d + 2)` of `-|x_i - x_j|^2`, fp32, for points `(B, N, d)`, d 2 or 3.

    In the host's order of columns, `(2 r_i, -|r_i|^2, 1)` and `(r_j, 1, -|r_j|^2)`, where r are coordinates relative
    to the middle of the box around each body: products stay as small as the body, wherever it is.
    Raises `ShapeError` for other points.
    """
    points = original_pos
    if points.dim() != 3 or points.shape[-1] not in (2, 3):
        raise ShapeError(
            f"points of shape {tuple(points.shape)}", "(B, N, 2) or (B, N, 3)", "set --space_dim to 2 or 3"
        )
    still = points.detach()  # distances do not depend on the middle
    middle = (still.amin(1, keepdim=True) + still.amax(1, keepdim=True)) / 2
    r = (points - middle).float().unsqueeze(2)
    square, one = r.square().sum(-1, keepdim=True), torch.ones_like(r[..., :1])
    return torch.cat((2 * r, -square, one), -1), torch.cat((r, one, -square), -1)


def attention(module: Any, x: Tensor, q_bias: Tensor, k_bias: Tensor, precision: str) -> Tensor:
    """`Spatial_Bias_Attention.forward`: x `(B, N, heads * dim_head)`, factors `(B, N, 1, R)` of any bias."""
    by_head = (module.heads, module.dim_head)
    query, key, value = (
        project(x).unflatten(-1, by_head).transpose(1, 2) for project in (module.to_q, module.to_k, module.to_v)
    )
    with torch.autocast(x.device.type, enabled=False):
        weight = module.pos_weight(x.to(module.pos_weight.weight.dtype).unflatten(-1, by_head)).float()
        q_factor, k_factor = (factor.float().transpose(1, 2) for factor in (q_bias, k_bias))  # (B, 1, N, R)
        q_factor = weight.transpose(1, 2).contiguous() * q_factor  # (B, H, N, R), copied while it is thin
        out = _attend(dtype_of(x, precision), query, key, value, q_factor, k_factor, module.scale)
    return module.to_out(by_position(out, x.dtype).transpose(1, 2).flatten(2))


def dtype_of(x: Tensor, precision: str) -> torch.dtype:
    """The dtype of queries, keys and values for an input `(B, N, dim)`."""
    if precision != "auto":
        return DTYPES[precision]
    if not x.is_cuda:
        return torch.float32
    return torch.float16 if x.shape[1] <= MOST_IN_HALF else torch.bfloat16


def _attend(
    dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, q_factor: Tensor, k_factor: Tensor, scale: float
) -> Tensor:
    if dtype == torch.float16 and torch.is_grad_enabled():
        return in_half(_operator, (query, key, value, q_factor, k_factor), scale)
    query, key, value = (lowered(tensor, dtype) for tensor in (query, key, value))
    return _operator(query, key, value, q_factor, k_factor, scale)


def _operator(query: Tensor, key: Tensor, value: Tensor, q_factor: Tensor, k_factor: Tensor, scale: float) -> Tensor:
    out = biased_attention(query, key, value, FactoredBias(q_factor, k_factor), scale=scale)
    assert isinstance(out, Tensor)
    return out


def not_covered(module: Any, x: Tensor, q_bias: Tensor, k_bias: Tensor) -> str | None:
    if x.device.type not in ("cpu", "cuda"):
        return f"a tensor on {x.device.type}"
    if x.dtype not in tuple(DTYPES.values()):
        return f"{x.dtype}"
    if any(factor.dim() != 4 or factor.shape[2] != 1 for factor in (q_bias, k_bias)):
        return "a bias with factors for each head"
    if is_hooked(module.pos_weight):
        return "a hook on pos_weight"
    return None


def flash_bias_func(*args: Any, **kwargs: Any) -> Tensor:
    """`layers.flash_bias_triton.flash_bias_func`, for every caller but a comparison with the host's own code."""
    if verify.comparing() and args[0].is_cuda:
        return getattr(sys.modules[KERNELS], KERNEL_KEPT)(*args, **kwargs)
    return flashbias.flash_bias_func(*args, **kwargs)
