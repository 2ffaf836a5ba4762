"""The gate of an attention's output, `sigmoid(g) * out`, laid out for the projection behind it; no gradients."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flashbias import plan

from .known import launch_known
from .replay import repeated, room

ENTRIES = 4096  # of a tile


def gated(gate: Tensor, out: Tensor, unit: Tensor | None) -> Tensor:
    """`sigmoid(gate) * out * unit`, `(*batch, N, H C)` in the dtype of the gate, rounded once; contiguous.

    gate and out `(*batch, H, N, C)`, of any strides; unit `(*batch, H, 1, 1)` in fp32, contiguous, or None for 1.
    """
    if out.numel() == 0:
        return gate.transpose(-2, -3).flatten(-2)
    (made,) = repeated("gate", (gate, out, unit), lambda: [_gated(gate, out, unit)])
    return made


def _gated(gate: Tensor, out: Tensor, unit: Tensor | None) -> Tensor:
    *lead, heads, n, c = out.shape
    made = room(gate, (*lead, n, heads * c))
    gate, out = gate.reshape(-1, heads, n, c), out.reshape(-1, heads, n, c)
    g_batch, g_head, g_row, g_column = gate.stride()
    o_batch, o_head, o_row, o_column = out.stride()
    width = plan.power_of_2(c)
    rows = min(max(ENTRIES // width, 1), plan.power_of_2(n))
    blocks = plan.cdiv(n, rows)
    launch_known(
        gate_kernel, (out.shape[0] * blocks * heads, 1), gate.device,
        {"gate": gate, "out": out, "unit": unit, "made": made, "n": n, "n_blocks": blocks,
         "g_batch": g_batch, "g_head": g_head, "g_row": g_row, "g_column": g_column,
         "o_batch": o_batch, "o_head": o_head, "o_row": o_row, "o_column": o_column},
        HEADS=heads, C=c, WIDTH=width, ROWS=rows,
    )  # fmt: skip
    return made


@triton.jit(do_not_specialize=["n", "n_blocks"])
def gate_kernel(
    gate, out, unit, made, n, n_blocks,
    g_batch, g_head, g_row, g_column, o_batch, o_head, o_row, o_column,
    HEADS: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of rows of one head; heads come one after the other, since what is made has them side by side."""
    i_h, i_all = (tl.program_id(0) % HEADS).to(tl.int64), tl.program_id(0) // HEADS
    i_b, i_block = (i_all // n_blocks).to(tl.int64), i_all % n_blocks
    o_n = i_block * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.arange(0, WIDTH)[None, :]
    inside = (o_n < n) & (o_c < C)
    o_n, o_c = o_n.to(tl.int64), o_c.to(tl.int64)
    p_gate = gate + i_b * g_batch + i_h * g_head + o_n * g_row + o_c * g_column
    b_gate = tl.sigmoid(tl.load(p_gate, mask=inside, other=0.0).to(tl.float32))
    p_out = out + i_b * o_batch + i_h * o_head + o_n * o_row + o_c * o_column
    b_out = tl.load(p_out, mask=inside, other=0.0).to(tl.float32)
    if unit is not None:
        b_out = b_out * tl.load(unit + i_b * HEADS + i_h)
    p_made = made + (i_b * n + o_n) * (HEADS * C) + i_h * C + o_c
    tl.store(p_made, (b_gate * b_out).to(made.dtype.element_ty), mask=inside)
