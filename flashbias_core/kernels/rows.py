"""A dense bias laid out row by row, where its heads lie side by side, as a projection of pairs leaves them.

What torch's copy of such a tensor reads and what it writes cannot both lie side by side for neighbouring threads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flashbias import plan

from .known import launch_known
from .replay import room

ENTRIES = 4096  # of a tile


def are_abreast(values: Tensor) -> bool:
    """Whether the heads of values `(*1, H, Nq, Nk)` lie side by side."""
    if values.dim() < 3 or values.shape[:-3].numel() != 1:
        return False
    heads, n_k = values.shape[-3], values.shape[-1]
    return 1 < heads <= ENTRIES and n_k > 1 and values.stride(-3) == 1 and values.stride(-1) == heads


def in_rows(values: Tensor, width: int) -> Tensor:
    """A copy of values whose heads lie side by side, with rows of so many entries; those behind Nk are anything."""
    heads, n_q, n_k = values.shape[-3:]
    out = room(values, (*values.shape[:-1], width))
    padded = plan.power_of_2(heads)
    columns = min(ENTRIES // padded, plan.power_of_2(n_k))
    launch_known(
        rows_kernel, (n_q, plan.cdiv(n_k, columns)), values.device,
        {"values": values, "out": out, "n_q": n_q, "n_k": n_k, "v_row": values.stride(-2), "o_row": width},
        HEADS=heads, WIDTH=padded, COLUMNS=columns,
    )  # fmt: skip
    return out[..., :n_k]


@triton.jit(do_not_specialize=["n_q", "n_k"])
def rows_kernel(values, out, n_q, n_k, v_row, o_row, HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """All heads of a part of a row."""
    i_q = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    o_h = tl.arange(0, WIDTH)[None, :]
    inside = (o_n < n_k) & (o_h < HEADS)
    b_values = tl.load(values + i_q * v_row + o_n * HEADS + o_h, mask=inside, other=0.0)
    tl.store(out + (o_h.to(tl.int64) * n_q + i_q) * o_row + o_n, b_values, mask=inside)
