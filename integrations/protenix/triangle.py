"""Triangle attention (algorithms 13 and 14 of AlphaFold 3) with one bias for all rows.

A row of the pair representation attends within itself: query j and key k of row i, with a bias of (j, k). The hosts'
mask adds -1e9 to keys; here they are not attended to at all. That differs only in a row without a single key, which
gets no update here, and the mean of all its values there.
"""

from __future__ import annotations

import importlib.util
import math
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from flashbias import DenseBias, Mask, Segments, biased_attention
from flashbias.integrations.integration import Replacement, say_once
from flashbias.patches import Patch

from . import fused, precision
from .inputs import not_computable, with_aligned_rows


def attention(
    module: Any,
    x: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    triangle_attention: str = "torch",
    inplace_safe: bool = False,
) -> Tensor:
    """`TriangleAttention.forward`: x `(*batch, N, N, c)`, mask `(*batch, N, N)`, 1 where a key may be attended to.

    With a `chunk_size`, so many rows at a time, to need less memory for projections.
    """
    if not module.starting:
        x = x.transpose(-2, -3)
        mask = None if mask is None else mask.transpose(-1, -2)
    x = fused.normalised(module.layer_norm, x)
    parts = fused.parts(module, x)
    values = fused.projected(module.linear, x, parts.bias).movedim(-1, -3)
    halves = precision.permits_halves(x, values.numel() * x.shape[-3])  # for all chunks alike: they share the bias
    if halves:
        values = precision.to_half(values)
    bias = DenseBias(with_aligned_rows(values).unsqueeze(-4))  # (*batch, 1, H, N, N)

    def attend(part: Tensor, part_mask: Tensor | None, place: Tensor | None = None) -> Tensor:
        return _attend(module.mha, part, bias, part_mask, halves, parts, place)

    if chunk_size is None:
        out = attend(x, mask)
    else:
        rows = max(1, chunk_size // math.prod(x.shape[:-3]))
        masks = repeat(None) if mask is None else mask.expand(x.shape[:-1]).split(rows, -2)
        chunks = zip(x.split(rows, -3), masks, strict=False)
        if inplace_safe and not torch.is_grad_enabled():
            for part, part_mask in chunks:  # no row reads another one
                attend(part, part_mask, place=part)
            out = x
        else:
            out = torch.cat([attend(part, part_mask) for part, part_mask in chunks], -3)
    return out if module.starting else out.transpose(-2, -3)


def _attend(
    mha: Any,
    x: Tensor,
    bias: DenseBias,
    mask: Tensor | None,
    halves: bool,
    parts: fused.Parts,
    place: Tensor | None,
) -> Tensor:
    """Gated attention within each row of x, `(*batch, rows, N, c)`; written to `place` where that is given."""
    query, key, value, gate = fused.joined(mha, x, parts.joint)  # (*batch, rows, H, N, C)
    scale, unit = mha.c_hidden**-0.5, None
    if halves:
        query, key, value, scale, unit = precision.as_halves(query, key, value, scale)
    out = biased_attention(query, key, value, bias, mask=_segments(mask), scale=scale)
    assert isinstance(out, Tensor)
    if mha.linear_g is None:
        out = precision.in_units(out, unit).flatten(-2)
    else:
        if gate is None:
            gate = mha.linear_g(x).unflatten(-1, (mha.no_heads, -1)).transpose(-2, -3)
        out = _gated(mha, gate, out, unit, parts.gate)
    return fused.placed(mha.linear_o, out, parts.out, place)


def _gated(mha: Any, gate: Tensor, out: Tensor, unit: Tensor | None, by_kernel: bool) -> Tensor:
    """The operator's output, in its unit, times the sigmoid of the gate, both `(*batch, rows, H, N, C)`, as
    `(*batch, rows, N, H C)`."""
    if by_kernel and type(gate) is Tensor and gate.dtype == (out.dtype if unit is None else unit.dtype):
        from flashbias.kernels.gate import gated

        return gated(gate, out, unit)
    out = precision.in_units(out, unit)
    gate = mha.sigmoid(gate.transpose(-2, -3).flatten(-2)).unflatten(-1, (mha.no_heads, -1))
    # In this order the product has the layout of the gate, whose heads lie side by side.
    out = gate * out if gate.requires_grad or out.requires_grad else gate.mul_(out)
    return out.flatten(-2)


def _segments(mask: Tensor | None) -> Mask | None:
    """A mask over keys as ids, which are read once for all queries; -1 is attended to by none."""
    if mask is None:
        return None
    k_ids = (mask == 1).to(torch.int8) - 1
    return Segments(torch.zeros_like(k_ids[..., :1, :]), k_ids)


def _not_covered(
    module: Any,
    x: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    triangle_attention: str = "torch",
    inplace_safe: bool = False,
) -> str | None:
    if x.dim() < 3 or x.shape[-2] != x.shape[-3]:
        return f"an input of shape {tuple(x.shape)}"
    return not_computable(x, module.mha, module.c_hidden)


_KEPT = "forward_before_flashbias"
_replacement = Replacement("protenix triangle attention", attention, _not_covered, original=_KEPT)


def forward(
    self: Any,
    x: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    triangle_attention: str = "torch",
    inplace_safe: bool = False,
) -> Tensor:
    """`TriangleAttention.forward`."""
    return _replacement(self, x, mask, chunk_size, triangle_attention, inplace_safe)


def multiplication(
    self: Any,
    z: Tensor,
    mask: Tensor | None = None,
    inplace_safe: bool = False,
    _add_with_inplace: bool = False,
    _inplace_chunk_size: int | None = 256,
    triangle_multiplicative: str = "torch",
) -> Tensor:
    """`TriangleMultiplicativeUpdate.forward`: the host's, without cuEquivariance where that is not installed."""
    if triangle_multiplicative == "cuequivariance" and importlib.util.find_spec("cuequivariance_torch") is None:
        say_once("protenix: cuEquivariance is not installed, torch computes the triangle multiplication")
        triangle_multiplicative = "torch"
    return self.forward_before_flashbias(
        z, mask, inplace_safe, _add_with_inplace, _inplace_chunk_size, triangle_multiplicative
    )


_MODULE = "protenix.model.triangular.triangular"
PATCHES = (
    Patch(
        f"{_MODULE}:TriangleAttention.forward",
        forward,
        ("self", "x", "mask", "chunk_size", "triangle_attention", "inplace_safe"),
        keep_as=_KEPT,
    ),
    Patch(
        f"{_MODULE}:TriangleMultiplicativeUpdate.forward",
        multiplication,
        ("self", "z", "mask", "inplace_safe", "_add_with_inplace", "_inplace_chunk_size", "triangle_multiplicative"),
        keep_as=_KEPT,
    ),
)
