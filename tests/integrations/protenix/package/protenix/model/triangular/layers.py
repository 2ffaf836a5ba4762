"""Projections and the gated attention that triangle attention is built from."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class OpenfoldLinear(nn.Linear):
    """A projection without bias that takes bf16 as it is, also under autocast."""

    def __init__(self, in_dim, out_dim):
        super().__init__(in_dim, out_dim, bias=False)

    def forward(self, input):
        if input.dtype != torch.bfloat16:
            return F.linear(input, self.weight)
        with torch.amp.autocast("cuda", enabled=False):
            return F.linear(input, self.weight.to(input.dtype))


class OpenFoldLayerNorm(nn.Module):
    """A layer norm that takes bf16 as it is, also under autocast."""

    def __init__(self, c_in, create_scale=True, create_offset=True, eps=1e-5):
        super().__init__()
        self.c_in, self.eps = (c_in,), eps
        self.register_parameter("weight", nn.Parameter(torch.ones(c_in)) if create_scale else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(c_in)) if create_offset else None)

    def forward(self, x):
        if x.dtype != torch.bfloat16:
            return F.layer_norm(x, self.c_in, self.weight, self.bias, self.eps)
        weight, bias = (None if w is None else w.to(x.dtype) for w in (self.weight, self.bias))
        with torch.amp.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.c_in, weight, bias, self.eps)


LayerNorm = OpenFoldLayerNorm


def _attention(query, key, value, biases):
    scores = query @ key.transpose(-1, -2)
    for bias in biases:
        scores = scores + bias
    return scores.softmax(-1, dtype=scores.dtype) @ value


class Attention(nn.Module):
    def __init__(self, c_q, c_k, c_v, c_hidden, no_heads, gating=True):
        super().__init__()
        self.c_hidden, self.no_heads = c_hidden, no_heads
        width = c_hidden * no_heads
        self.linear_q, self.linear_k, self.linear_v = (OpenfoldLinear(c, width) for c in (c_q, c_k, c_v))
        self.linear_o = OpenfoldLinear(width, c_q)
        self.linear_g = OpenfoldLinear(c_q, width) if gating else None
        self.sigmoid = nn.Sigmoid()

    def _prep_qkv(self, q_x, kv_x, apply_scale=True):
        parts = self.linear_q(q_x), self.linear_k(kv_x), self.linear_v(kv_x)
        q, k, v = (part.unflatten(-1, (self.no_heads, self.c_hidden)).transpose(-2, -3) for part in parts)
        return q / math.sqrt(self.c_hidden) if apply_scale else q, k, v

    def _wrap_up(self, o, q_x):
        if self.linear_g is not None:
            o = o * self.sigmoid(self.linear_g(q_x)).unflatten(-1, (self.no_heads, self.c_hidden))
        return self.linear_o(o.flatten(-2))

    def forward(self, q_x, kv_x, biases=None, triangle_attention="torch"):
        # As in the original, other kernels scale by themselves, and up to 16 keys they are not called: no scale at all.
        q, k, v = self._prep_qkv(q_x, kv_x, apply_scale=triangle_attention in ("torch", "triattention"))
        if triangle_attention != "torch" and q.shape[-2] > 16:
            raise ImportError(f"the kernel {triangle_attention} is not installed")
        return self._wrap_up(_attention(q, k, v, biases or ()).transpose(-2, -3), q_x)
