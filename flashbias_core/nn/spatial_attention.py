"""Attention over the points of a mesh or a cloud, with learned weights of squared distances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashbias.attention import biased_attention
from flashbias.biases import SpatialDistance
from flashbias.errors import ShapeError
from flashbias.masks import Mask


class SpatialAttention(nn.Module):
    """Multi-head attention whose scores are lowered by `w_hi |x_i - x_j|^2`.

    The weights w, of either sign, are a linear function of each query's features, as in the PDE solver of the FlashBias
    paper (Wu et al., 2025, section 4.3). Distances are exact in fp32, whatever the dtype of the features, wherever the
    points lie; the weights are fp32 too. Memory grows with N.

    Args:
        dim: of the features.
        heads: number of heads.
        dim_head: head dim, `dim / heads` by default.
        bias: whether the projections of query, key and value have a bias.

    Raises:
        ShapeError: where heads do not divide dim and no dim_head is given.
    """

    def __init__(self, dim: int, heads: int = 8, dim_head: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        if dim_head is None and dim % heads:
            raise ShapeError(f"dim {dim} and {heads} heads", "heads that divide dim", "choose others, or give dim_head")
        self.heads, self.dim_head = heads, dim_head or dim // heads
        inner = self.heads * self.dim_head
        self.to_query, self.to_key, self.to_value = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.to_weight = nn.Linear(dim, heads)
        self.to_out = nn.Linear(inner, dim)

    def forward(
        self,
        x: Tensor,
        points: Tensor,
        context: Tensor | None = None,
        context_points: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
    ) -> Tensor:
        """Attend to x itself, or to a context, as from the points of one mesh to those of another.

        Args:
            x, points: features `(*batch, N, dim)` and coordinates `(*batch, N, d)`, any d.
            context, context_points: `(*batch, M, dim)` and `(*batch, M, d)`, both or neither.
            mask: as of `biased_attention`.

        Returns:
            `(*batch, N, dim)`.

        Raises:
            ShapeError, DtypeError, DeviceError, UnsupportedError: as of `biased_attention`.
        """
        if (context is None) != (context_points is None):
            raise ShapeError("only one of context and context_points", "both or neither", "pass the other too")
        if context is None or context_points is None:
            context, context_points = x, points
        query, key, value = (
            layer(features).unflatten(-1, (self.heads, self.dim_head)).transpose(-3, -2)
            for layer, features in ((self.to_query, x), (self.to_key, context), (self.to_value, context))
        )
        with torch.autocast(x.device.type, enabled=False):
            weight = self.to_weight(x.to(self.to_weight.weight.dtype)).float().transpose(-2, -1)
        out = biased_attention(query, key, value, SpatialDistance(points, context_points, weight), mask=mask)
        assert isinstance(out, Tensor)
        return self.to_out(out.transpose(-3, -2).flatten(-2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dim_head={self.dim_head}"
