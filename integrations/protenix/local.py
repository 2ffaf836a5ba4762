"""Local atom attention: windows of 32 atoms that attend to 128 around them, with a bias of each window's own.

The windows of keys and values overlap: they are views of projections of the atoms, padded on both sides. The hosts
write padding as -1e10 into a matrix over all pairs of atoms, which they make anew in every call; here the bias of a
window has it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias import DenseBias, biased_attention
from flashbias.integrations.integration import Replacement
from flashbias.patches import Patch

from .diffusion import kept_bias
from .inputs import not_computable


def attention(
    module: Any,
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    n_queries: int = 32,
    n_keys: int = 128,
    inplace_safe: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """`AttentionPairBias.local_multihead_attention`: q, kv `(*batch, N, c)`; z `(*batch, windows, 32, 128, c_z)`.

    Window w has the queries from `32 w` on and the keys from `32 w - 48` on. It needs no chunks: no matrix is made.
    """
    atoms, windows = q.shape[-2], z.shape[-4]
    missing, before = windows * n_queries - atoms, (n_keys - n_queries) // 2
    bias = kept_bias(module, lambda: _bias(module, z, atoms, before))
    lead = q.shape[:-2]
    if len({own == full for own, full in zip(bias.shape[:-4], lead, strict=True) if full > 1}) > 1:
        bias = bias.expand(*lead, *bias.shape[-4:]).contiguous()  # the kernels want those that share it side by side
    inner = module.attention
    q = F.pad(q, (0, 0, 0, missing)).unflatten(-2, (windows, n_queries))
    kv = F.pad(kv, (0, 0, before, missing + before))
    query, key, value = inner._prep_qkv(q_x=q, kv_x=kv, apply_scale=False)
    # (*batch, H, atoms, C) -> (*batch, windows, H, keys, C)
    key, value = (x.unfold(-2, n_keys, n_queries).transpose(-1, -2).transpose(-3, -4) for x in (key, value))
    out = biased_attention(query, key, value, DenseBias(bias), scale=inner.c_hidden**-0.5)
    assert isinstance(out, Tensor)
    return inner._wrap_up(out.transpose(-2, -3), q).flatten(-3, -2)[..., :atoms, :]


def _bias(module: Any, z: Tensor, atoms: int, before: int) -> Tensor:
    """`(*batch, windows, H, queries, keys)`, with -inf for keys that are no atoms; every window has atoms."""
    bias = module.linear_nobias_z(module.layernorm_z(z)).movedim(-1, -3)
    windows, (n_queries, n_keys) = z.shape[-4], bias.shape[-2:]
    real = bias.new_ones(atoms, dtype=torch.bool)
    real = F.pad(real, (before, windows * n_queries - atoms + before)).unfold(0, n_keys, n_queries)
    return bias.contiguous().masked_fill(~real[:, None, None], -torch.inf)


def _not_covered(
    module: Any,
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    n_queries: int = 32,
    n_keys: int = 128,
    inplace_safe: bool = False,
    chunk_size: int | None = None,
) -> str | None:
    if module.attention.local_attention_method != "local_cross_attention":
        return f"local_attention_method={module.attention.local_attention_method!r}"
    windows = -(-q.shape[-2] // n_queries)
    if q.shape != kv.shape or z.dim() != q.dim() + 2 or z.shape[-4:-1] != (windows, n_queries, n_keys):
        return f"a pair representation of shape {tuple(z.shape)} for atoms of shape {tuple(q.shape)}"
    return not_computable(q, module.attention, module.attention.c_hidden)


_KEPT = "local_multihead_attention_before_flashbias"
_replacement = Replacement("protenix local attention", attention, _not_covered, original=_KEPT)


def local_multihead_attention(
    self: Any,
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    n_queries: int = 32,
    n_keys: int = 128,
    inplace_safe: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """`AttentionPairBias.local_multihead_attention`."""
    return _replacement(self, q, kv, z, n_queries, n_keys, inplace_safe, chunk_size)


PATCH = Patch(
    "protenix.model.modules.transformer:AttentionPairBias.local_multihead_attention",
    local_multihead_attention,
    ("self", "q", "kv", "z", "n_queries", "n_keys", "inplace_safe", "chunk_size"),
    keep_as=_KEPT,
)
