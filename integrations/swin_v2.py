"""SwinV2 of timm: window attention with the exact bias table, never holding the scores or a mask in memory.

Importing this module patches `timm.models.swin_transformer_v2`, at once or when timm is imported; `revert()` undoes it.
Weights, state dicts and results stay what they are, in inference and in training.

The bias of SwinV2 is a matrix `(H, N, N)` that a small network makes from relative positions, the same for every
window. It is read as it is (`DenseBias`): in inference it is made once and kept until the weights change, in training
and inside compiled or exported graphs it is made in every call, so that gradients and new weights reach it.
Under autocast it is nevertheless made in fp32, which is closer to the model in fp32 than timm's 16-bit bias.

A shifted window's mask says which positions belong to the same part of the image. timm adds -100 between others;
here they do not attend to each other at all. (Scores of cosine attention are bounded by `exp(logit_scale) + 16`, so
timm's way gives a weight of about `exp(2 * exp(logit_scale) - 84)` at most: nothing, unless the scale is above 30.)
"""

import contextlib
import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashbias import DenseBias, Segments, biased_attention
from flashbias.patches import Patch, PatchSet

from .derived import Derived, readable
from .integration import Integration, Replacement

MODULE = "timm.models.swin_transformer_v2"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_tables: Derived[Tensor] = Derived()
_segments: Derived[Tensor] = Derived()
_partitions: Derived[bool] = Derived()


# Optional, because TorchScript reads this signature.
def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
    """`WindowAttention.forward`: x `(images * windows, N, C)`, mask `(windows, N, N)`, 0 or -100, or None."""
    if torch.jit.is_scripting():
        return self.forward_before_flashbias(x, mask)
    else:
        return _replacement(self, x, mask)


def train(self: Any, mode: bool = True) -> Any:
    """`WindowAttention.train`, also what `eval` calls: a good moment to make the table anew."""
    forget(self)
    return self.train_before_flashbias(mode)


def forget(module: nn.Module) -> None:
    """Make the tables of a model, or of one attention, anew at the next call.

    Needed only after weights were written through `.data`, which torch does not count as a change.
    """
    for part in module.modules():
        _tables.forget(part)


def window_attention(attention: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Window attention of the module, like `WindowAttention.forward`."""
    windows, n, channels = x.shape
    query, key, value = (
        _project(attention, x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    scale = torch.clamp(attention.logit_scale, max=math.log(100)).exp()
    # Under autocast normalisation is fp32; v has the dtype in which the products are taken.
    query = (F.normalize(query, dim=-1) * scale).to(value.dtype)
    key = F.normalize(key, dim=-1).to(value.dtype)
    bias = DenseBias(_bias(attention, value.dtype))
    if mask is None:
        out = biased_attention(query, key, value, bias, scale=1.0)
    else:
        per_image = mask.shape[0]
        query, key, value = (t.unflatten(0, (windows // per_image, per_image)) for t in (query, key, value))
        ids = _segment_ids(attention, mask)
        out = biased_attention(query, key, value, bias, mask=Segments(ids, ids), scale=1.0)
    assert isinstance(out, Tensor)
    out = out.transpose(-3, -2).reshape(windows, n, channels)
    return attention.proj_drop(attention.proj(out))


def _project(attention: Any, x: Tensor) -> Tensor:
    """Queries, keys and values side by side, `(images * windows, N, 3 * C)`; the key has no bias to learn."""
    if attention.q_bias is None:
        return attention.qkv(x)
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if getattr(attention, "qkv_bias_separate", False):
        return attention.qkv(x) + bias
    return F.linear(x, attention.qkv.weight, bias)


def _bias(attention: Any, dtype: torch.dtype) -> Tensor:
    """The bias `(H, N, N)`: kept where nothing can change it unseen, otherwise made now.

    fp32 where it is differentiated (a gradient would be rounded by the cast), or where everything is; else fp16, which
    holds numbers up to 16 better than bf16 does.
    """
    weights = [*attention.cpb_mlp.parameters(), *attention.cpb_mlp.buffers()]
    differentiated = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    live = attention.training or differentiated
    stored = torch.float32 if live or dtype == torch.float32 else torch.float16
    if live or torch.compiler.is_compiling():
        return _make_bias(attention, stored)
    made_from = [*weights, attention.relative_coords_table, attention.relative_position_index]
    return _tables.get(attention, made_from, stored, lambda: _make_bias(attention, stored))


def _make_bias(attention: Any, dtype: torch.dtype) -> Tensor:
    table, index = attention.relative_coords_table, attention.relative_position_index
    # Rows start at multiples of 16 bytes, as wide loads want them: for a window of 7 x 7, 49 of 56 columns are used.
    n = index.shape[-1]
    index = F.pad(index, (0, -n % 8))
    with _without_autocast(table.device.type):
        per_offset = 16 * torch.sigmoid(attention.cpb_mlp(table).flatten(0, -2).float())
    return per_offset[index].permute(2, 0, 1).to(dtype, memory_format=torch.contiguous_format)[..., :n]


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _segment_ids(attention: Any, mask: Tensor) -> Tensor:
    """Ids `(windows, N)`, equal where the mask is 0: the first position of each one's part of the window."""

    def make() -> Tensor:
        return (mask == 0).to(torch.uint8).argmax(-1).to(torch.int32)

    return make() if torch.compiler.is_compiling() else _segments.get(attention, [mask], None, make)


def _is_partition(attention: Any, mask: Tensor) -> bool:
    """Whether a mask is 0 within the parts of a window and -100 or less between them, as those of timm's blocks are."""

    def look() -> bool:
        ids = _segment_ids(attention, mask)
        apart = ids[:, :, None] != ids[:, None, :]
        return bool((torch.where(apart, mask <= -100, mask == 0)).all())

    # A compiler cannot branch on values, and need not: a mask by another hand does not come through a timm model.
    return torch.compiler.is_compiling() or not readable(mask) or _partitions.get(attention, [mask], None, look)


def _not_covered(attention: Any, x: Tensor, mask: Tensor | None = None) -> str | None:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if device not in ("cpu", "cuda"):
        return f"a tensor on {device}"
    if dtype not in DTYPES:
        return f"{dtype}"
    if attention.training and getattr(attention.attn_drop, "p", 0) > 0:
        return "attention dropout in training"
    if attention.attn_drop._forward_hooks or attention.softmax._forward_hooks:
        return "a hook on the attention weights, which are never made,"
    if mask is not None and not _is_partition(attention, mask):
        return "a mask that is not one of a shifted window"
    return None


_KEPT = "forward_before_flashbias"
_replacement = Replacement("swin_v2 (timm)", window_attention, _not_covered, original=_KEPT)
INTEGRATION = Integration(
    "swin_v2",
    PatchSet(
        Patch(f"{MODULE}:WindowAttention.forward", forward, ("self", "x", "mask"), keep_as=_KEPT),
        Patch(f"{MODULE}:WindowAttention.train", train, ("self", "mode"), keep_as="train_before_flashbias"),
        distribution="timm",
        versions=">=1.0,<2",
    ),
)
apply, revert, is_applied = INTEGRATION.apply, INTEGRATION.revert, INTEGRATION.is_applied


def configure(*, mode: str = "exact") -> None:
    """Choose how the bias is computed.

    `"exact"`: the dense table, in inference and in training.

    Raises `ConfigurationError` for any other mode.
    """
    INTEGRATION.configure(mode=mode)


INTEGRATION.patches.apply_when_imported()
