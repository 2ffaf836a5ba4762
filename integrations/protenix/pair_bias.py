"""Pair-biased attention between tokens: Pairformer, confidence head and diffusion transformer."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flashbias import DenseBias, biased_attention
from flashbias.integrations.integration import Replacement
from flashbias.patches import Patch

from . import precision
from .diffusion import kept_bias
from .inputs import not_computable, with_aligned_rows

_PARAMETERS = ("self", "q", "kv", "z", "inplace_safe", "enable_efficient_fusion")


def attention(
    module: Any, q: Tensor, kv: Tensor, z: Tensor, inplace_safe: bool = False, enable_efficient_fusion: bool = False
) -> Tensor:
    """`AttentionPairBias.standard_multihead_attention`.

    q, kv `(*batch, N, c)`; z `(*batch, N, N, c_z)`, or `(*batch, c_z, N, N)` and normalised with
    `enable_efficient_fusion`.
    """
    bias = kept_bias(module, lambda: with_aligned_rows(_bias(module, z, enable_efficient_fusion)))
    inner = module.attention
    query, key, value = inner._prep_qkv(q, kv, apply_scale=False)
    query, key, value, scale, unit = precision.as_permitted(query, key, value, inner.c_hidden**-0.5)
    out = biased_attention(query, key, value, DenseBias(bias), scale=scale)
    assert isinstance(out, Tensor)
    return inner._wrap_up(precision.in_units(out, unit), q)


def _bias(module: Any, z: Tensor, fused: bool) -> Tensor:
    """`(*batch, H, N, N)`; what `layernorm_z` and the projection do is one convolution over what is normalised."""
    if fused:
        weight = module.linear_nobias_z.weight * module.layernorm_z.weight
        return F.conv2d(z, weight[:, :, None, None])
    return module.linear_nobias_z(module.layernorm_z(z)).movedim(-1, -3)


def _not_covered(
    module: Any, q: Tensor, kv: Tensor, z: Tensor, inplace_safe: bool = False, enable_efficient_fusion: bool = False
) -> str | None:
    return not_computable(q, module.attention, module.attention.c_hidden)


_KEPT = "standard_multihead_attention_before_flashbias"
_replacement = Replacement("protenix pair-biased attention", attention, _not_covered, original=_KEPT)


def standard_multihead_attention(
    self: Any, q: Tensor, kv: Tensor, z: Tensor, inplace_safe: bool = False, enable_efficient_fusion: bool = False
) -> Tensor:
    """`AttentionPairBias.standard_multihead_attention`."""
    return _replacement(self, q, kv, z, inplace_safe, enable_efficient_fusion)


PATCH = Patch(
    "protenix.model.modules.transformer:AttentionPairBias.standard_multihead_attention",
    standard_multihead_attention,
    _PARAMETERS,
    keep_as=_KEPT,
)
