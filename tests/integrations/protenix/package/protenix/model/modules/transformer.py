"""Attention with a pair bias, and the transformer of the diffusion module."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from protenix.model.triangular.layers import LayerNorm


class Attention(nn.Module):
    def __init__(self, c, c_hidden, num_heads):
        super().__init__()
        self.c_hidden, self.num_heads = c_hidden, num_heads
        self.linear_q = nn.Linear(c, c_hidden * num_heads)
        self.linear_k, self.linear_v, self.linear_o, self.linear_g = (nn.Linear(c, c, bias=False) for _ in range(4))

    def _prep_qkv(self, q_x, kv_x, apply_scale=True):
        parts = self.linear_q(q_x), self.linear_k(kv_x), self.linear_v(kv_x)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3) for part in parts)
        return q / math.sqrt(self.c_hidden) if apply_scale else q, k, v

    def _wrap_up(self, o, q_x):
        gate = self.linear_g(q_x).sigmoid().unflatten(-1, (self.num_heads, -1))
        return self.linear_o((o * gate).flatten(-2))

    local_attention_method = "local_cross_attention"

    def forward(self, q_x, kv_x, attn_bias=None, trunked_attn_bias=None, n_queries=None, n_keys=None, **options):
        q, k, v = self._prep_qkv(q_x, kv_x)
        if n_queries:
            attn_bias = _over_all_pairs(trunked_attn_bias, q.shape[-2])
        if attn_bias.dim() < q.dim():
            attn_bias = attn_bias.unsqueeze(-3)
        weights = (q.float() @ k.float().transpose(-1, -2) + attn_bias.float()).softmax(-1)
        return self._wrap_up((weights.to(v.dtype) @ v).transpose(-2, -3), q_x)


def _over_all_pairs(windows, n):
    """The matrix `(..., H, n, n)` for biases of windows `(..., H, windows, queries, keys)`: elsewhere -1e10."""
    n_windows, n_queries, n_keys = windows.shape[-3:]
    before = (n_keys - n_queries) // 2
    wide = windows.new_full((*windows.shape[:-3], n_windows * n_queries, n_windows * n_queries + 2 * before), -1e10)
    for w in range(n_windows):
        start = w * n_queries
        wide[..., start : start + n_queries, start : start + n_keys] = windows[..., w, :, :]
    return wide[..., :n, before : before + n]


class AttentionPairBias(nn.Module):
    def __init__(
        self,
        has_s=True,
        create_offset_ln_z=False,
        n_heads=16,
        c_a=768,
        c_s=384,
        c_z=128,
        biasinit=-2.0,
        cross_attention_mode=False,
    ):
        super().__init__()
        self.has_s = has_s
        self.layernorm_a = LayerNorm(c_a)
        self.layernorm_kv = LayerNorm(c_a) if cross_attention_mode else nn.Identity()
        self.attention = Attention(c_a, c_a // n_heads, n_heads)
        self.layernorm_z = LayerNorm(c_z, create_offset=create_offset_ln_z)
        self.linear_nobias_z = nn.Linear(c_z, n_heads, bias=False)
        if has_s:
            self.linear_a_last = nn.Linear(c_s, c_a)

    def standard_multihead_attention(self, q, kv, z, inplace_safe=False, enable_efficient_fusion=False):
        if enable_efficient_fusion:
            bias = F.conv2d(z, (self.linear_nobias_z.weight * self.layernorm_z.weight)[..., None, None])
        else:
            bias = self.linear_nobias_z(self.layernorm_z(z)).movedim(-1, -3)
        return self.attention(q_x=q, kv_x=kv, attn_bias=bias, inplace_safe=inplace_safe)

    def local_multihead_attention(self, q, kv, z, n_queries=32, n_keys=128, inplace_safe=False, chunk_size=None):
        assert z.shape[-3:-1] == (n_queries, n_keys)
        bias = self.linear_nobias_z(self.layernorm_z(z)).movedim(-1, -4)
        return self.attention(q_x=q, kv_x=kv, trunked_attn_bias=bias, n_queries=n_queries, n_keys=n_keys)

    def forward(
        self,
        a,
        s,
        z,
        n_queries=None,
        n_keys=None,
        inplace_safe=False,
        chunk_size=None,
        enable_efficient_fusion=False,
    ):
        a = self.layernorm_a(a)
        kv = self.layernorm_kv(a)
        if n_queries and n_keys:
            a = self.local_multihead_attention(a, kv, z, n_queries, n_keys, inplace_safe, chunk_size)
        else:
            a = self.standard_multihead_attention(a, kv, z, inplace_safe, enable_efficient_fusion)
        return torch.sigmoid(self.linear_a_last(s)) * a if self.has_s else a


class DiffusionTransformerBlock(nn.Module):
    def __init__(self, c_a, c_s, c_z, n_heads, cross_attention_mode):
        super().__init__()
        self.attention_pair_bias = AttentionPairBias(
            n_heads=n_heads, c_a=c_a, c_s=c_s, c_z=c_z, cross_attention_mode=cross_attention_mode
        )

    def forward(self, a, s, z, **options):
        return a + self.attention_pair_bias(a, s, z, **options), s, z


class DiffusionTransformer(nn.Module):
    def __init__(self, c_a, c_s, c_z, n_blocks, n_heads, cross_attention_mode=False):
        super().__init__()
        self.blocks = nn.ModuleList(
            DiffusionTransformerBlock(c_a, c_s, c_z, n_heads, cross_attention_mode) for _ in range(n_blocks)
        )

    def forward(self, a, s, z, **options):
        for block in self.blocks:
            a, s, z = block(a, s, z, **options)
        return a


class AtomTransformer(nn.Module):
    def __init__(self, c_atom=128, c_atompair=16, n_blocks=3, n_heads=4, n_queries=32, n_keys=128):
        super().__init__()
        self.n_queries, self.n_keys = n_queries, n_keys
        self.diffusion_transformer = DiffusionTransformer(
            c_a=c_atom, c_s=c_atom, c_z=c_atompair, n_blocks=n_blocks, n_heads=n_heads, cross_attention_mode=True
        )

    def forward(self, q, c, p, inplace_safe=False, chunk_size=None):
        return self.diffusion_transformer(
            a=q, s=c, z=p, n_queries=self.n_queries, n_keys=self.n_keys, inplace_safe=inplace_safe
        )
