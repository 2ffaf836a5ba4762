"""What else one can do to SwinV2's attention: fair opponents for the patch, in inference only.

The bias does not change between calls, so its matrix can be kept, in the dtype of the computation; with a shifted
window's mask added to it, and the windows moved to the heads, every call is one of torch's own attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashbias.patches import Patch, PatchSet

_TARGET = "timm.models.swin_transformer_v2:WindowAttention.forward"


def replace_attention(model: nn.Module, kind: str, dtype: torch.dtype) -> PatchSet:
    """Have timm's SwinV2 compute its attention by torch's own, from now on; `revert()` of what is returned undoes it.

    `kind`: `"dense"` keeps bias plus mask of every block of `model` as a matrix of `dtype`; `"no bias"` leaves both
    out, so that the result is wrong, and the time one that no patch of the attention can be far below.
    """
    if kind == "dense":
        blocks: list[Any] = [module for module in model.modules() if hasattr(module, "attn_mask")]
        for block in blocks:
            kept = _bias(block.attn, block.attn_mask).to(dtype).contiguous()  # for other strides torch has no fast way
            block.attn.register_buffer("kept_bias", kept, persistent=False)
    forward = {"dense": _with_kept_bias, "no bias": _without_bias}[kind]
    patches = PatchSet(Patch(_TARGET, forward, ("self", "x", "mask")))
    patches.apply()
    return patches


def _with_kept_bias(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = _query_key_value(self, x)
    if mask is None:
        return _finish(self, F.scaled_dot_product_attention(query, key, value, self.kept_bias, scale=1.0))
    # (images * windows, H, N, C) -> (images, windows * H, N, C): the mask differs by window, and broadcasts over images
    windows, heads = len(mask), self.num_heads
    query, key, value = (t.unflatten(0, (-1, windows)).flatten(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, self.kept_bias, scale=1.0)
    return _finish(self, out.unflatten(1, (windows, heads)).flatten(0, 1))


def _without_bias(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return _finish(self, F.scaled_dot_product_attention(*_query_key_value(self, x), scale=1.0))


def _query_key_value(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(images * windows, H, N, C)` each; query and key normalised, the head's scale in the query."""
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    projected = F.linear(x, attention.qkv.weight, bias).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
    query = F.normalize(query, dim=-1) * attention.logit_scale.clamp(max=math.log(100)).exp()
    return query.to(value.dtype), F.normalize(key, dim=-1).to(value.dtype), value


def _finish(attention: Any, out: Tensor) -> Tensor:
    return attention.proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def _bias(attention: Any, mask: Tensor | None) -> Tensor:
    """The bias `(1, H, N, N)`; with a mask `(windows, N, N)`, both together as `(1, windows * H, N, N)`."""
    table = attention.cpb_mlp(attention.relative_coords_table).flatten(0, -2)
    bias = 16 * torch.sigmoid(table[attention.relative_position_index].permute(2, 0, 1))
    return bias[None] if mask is None else (bias + mask[:, None]).flatten(0, 1)[None]
