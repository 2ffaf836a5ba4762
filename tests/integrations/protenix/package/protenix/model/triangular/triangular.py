"""Triangle attention, and as much of the triangle multiplication as a kernel's name can change."""

from functools import partialmethod

import torch
from torch import nn

from protenix.model.triangular.layers import Attention, LayerNorm, OpenfoldLinear


class TriangleAttention(nn.Module):
    def __init__(self, c_in, c_hidden, no_heads, starting=True, inf=1e9):
        super().__init__()
        self.c_in, self.c_hidden, self.no_heads = c_in, c_hidden, no_heads
        self.starting, self.inf = starting, inf
        self.layer_norm = LayerNorm(c_in)
        self.linear = OpenfoldLinear(c_in, no_heads)
        self.mha = Attention(c_in, c_in, c_in, c_hidden, no_heads)

    def forward(self, x, mask=None, chunk_size=None, triangle_attention="torch", inplace_safe=False):
        mask = x.new_ones(x.shape[:-1]) if mask is None else mask
        if not self.starting:
            x, mask = x.transpose(-2, -3), mask.transpose(-1, -2)
        x = self.layer_norm(x)
        mask_bias = self.inf * (mask - 1)[..., None, None, :]
        triangle_bias = self.linear(x).movedim(-1, -3).unsqueeze(-4)
        if chunk_size is None:
            x = self.mha(x, x, [mask_bias, triangle_bias], triangle_attention)
        else:
            # All batch dimensions are one, as rows are; the bias is expanded to them.
            shape = x.shape
            rows = x.flatten(0, -3)
            mask_rows = mask_bias.flatten(0, -4)
            bias_rows = triangle_bias.expand(*shape[:-2], *triangle_bias.shape[-3:]).flatten(0, -4)
            parts = [tensor.split(chunk_size) for tensor in (rows, mask_rows, bias_rows)]
            outs = [self.mha(part, part, [m, b], triangle_attention) for part, m, b in zip(*parts, strict=True)]
            out = torch.cat(outs).view(shape)
            x = x.copy_(out) if inplace_safe else out
        return x if self.starting else x.transpose(-2, -3)


TriangleAttentionStartingNode = TriangleAttention


class TriangleAttentionEndingNode(TriangleAttention):
    __init__ = partialmethod(TriangleAttention.__init__, starting=False)


class TriangleMultiplicativeUpdate(nn.Module):
    def __init__(self, c_z, c_hidden, _outgoing=True):
        super().__init__()
        self.c_z, self.c_hidden, self._outgoing = c_z, c_hidden, _outgoing
        self.linear_a_p, self.linear_b_p = OpenfoldLinear(c_z, c_hidden), OpenfoldLinear(c_z, c_hidden)
        self.linear_z = OpenfoldLinear(c_hidden, c_z)

    def forward(
        self,
        z,
        mask=None,
        inplace_safe=False,
        _add_with_inplace=False,
        _inplace_chunk_size=256,
        triangle_multiplicative="torch",
    ):
        if triangle_multiplicative == "cuequivariance":
            import cuequivariance_torch  # noqa: F401
        a, b = self.linear_a_p(z), self.linear_b_p(z)
        equation = "...ikc,...jkc->...ijc" if self._outgoing else "...kic,...kjc->...ijc"
        update = self.linear_z(torch.einsum(equation, a, b))
        return z + update if _add_with_inplace else update


class TriangleMultiplicationOutgoing(TriangleMultiplicativeUpdate):
    __init__ = partialmethod(TriangleMultiplicativeUpdate.__init__, _outgoing=True)
