"""One call of the operator as its kernels take it: blocks, sizes, constants, and which tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashbias import plan
from flashbias.operands import Operands

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # triton 3.3 has none that the host can make
    TensorDescriptor = None

from .columns import score_columns
from .layout import Layout
from .terms import Block, Masks, Terms


@dataclass
class Call:
    """What all kernels of one call take."""

    layout: Layout
    q: Block
    k: Block
    v: Block
    planes: Tensor | None
    sizes: dict[str, Any]
    constants: dict[str, Any]

    @property
    def long(self) -> bool:
        """Whether rows are long, and no dense bias takes registers too."""
        return self.sizes["n_k"] >= plan.LONG and self.sizes["terms"].matrix is None

    def tiles(self, kind: str, query: Tensor) -> plan.Tiles:
        """The tiles of a kernel for this call."""
        terms, masks = self.sizes["terms"], self.sizes["masks"]
        traits = {
            "LONG": self.long,
            "DENSE": terms.matrix is not None,
            "ALLOWED": masks.allowed is not None,
            "POSITIONS": terms.q_positions is not None or masks.q_ids is not None,
            "SLOPES": terms.slopes is not None,
            "TABLE": terms.table is not None,
            "FEW": self.sizes["n_q"] <= plan.FEW,
        }
        masked = self.constants["CAUSAL"] or traits["ALLOWED"] or masks.q_ids is not None
        traits["BARE"] = not (masked or traits["SLOPES"])
        return plan.tiles(kind, query.device, query.dtype, self.constants | traits)

    def descriptor(self, tiles: plan.Tiles) -> Any:
        """How a dense bias is read tile by tile: a tensor descriptor, or None for pointers or no such bias."""
        if self.planes is None:
            return None
        return TensorDescriptor.from_tensor(self.planes, [1, tiles.block_m, tiles.block_n])


def prepare(
    query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float, *, values_gradient: bool = False
) -> Call:
    """The blocks and constants of a call."""
    heads, n_q, c = query.shape[-3:]
    n_k, c_v = value.shape[-2:]
    columns = None
    if operands.q_factor is not None and operands.k_factor is not None:
        columns = score_columns(operands.q_factor, operands.k_factor, query.dtype, scale)
    o = operands
    q_columns, k_columns = (columns.q, columns.k) if columns else (None, None)
    values = None if o.values is None else _aligned(o.values)
    planes = None if values is None else _planes(values)
    allowed = None if o.allowed is None else o.allowed.view(torch.uint8)
    if allowed is not None and allowed.stride(-1) != 1:
        allowed = allowed.contiguous()
    vectors = [(query, 3), (key, 3), (value, 3), (q_columns, 3), (k_columns, 3), (o.slopes, 1), (o.q_positions, 1)]
    vectors += [(o.table, 2)]
    vectors += [(o.k_positions, 1), (o.offsets, 0), (o.lengths, 0), (o.q_ids, 1), (o.k_ids, 1)]
    matrices = [(values, 3), (allowed, 3)]
    if values_gradient and o.values is not None:
        # The gradient is laid out by the shape of the values, whatever their strides.
        matrices.append((torch.empty(o.values.shape, device="meta"), 3))
    layout = Layout(query.shape[:-3], heads, vectors, matrices)

    def block(tensor: Tensor | None, **flags: bool) -> Block | None:
        return None if tensor is None else layout.block(tensor, **flags)

    per_position = {"head": False, "row": True, "column": False}
    per_batch = {"head": False, "row": False, "column": False}
    terms = Terms(
        block(q_columns),
        block(k_columns),
        block(o.slopes, row=False, column=False),
        block(_positions(o.q_positions), **per_position),
        block(_positions(o.k_positions), **per_position),
        block(values) if values is None or planes is None else _count_planes(layout.block(values), planes),
        block(o.table, row=False),
        None if o.table is None else o.table.shape[-1] // 2,
    )
    masks = Masks(
        block(o.offsets, **per_batch),
        block(o.lengths, **per_batch),
        block(o.q_ids, **per_position),
        block(o.k_ids, **per_position),
        block(allowed),
    )
    rank = 0 if columns is None else columns.k.shape[-1]
    sizes = {
        "terms": terms, "masks": masks, "n_q": n_q, "n_k": n_k, "n_inner": layout.inner, "n_heads": heads,
        "group": heads // max(key.shape[-3], 1), "offset": o.offset, "unit": scale,
    }  # fmt: skip
    constants = {
        "C": c, "C_V": c_v, "RANK": rank, "WIDTH": plan.width(c), "WIDTH_V": plan.width(c_v),
        "CHUNK": plan.chunk(rank), "FOLDED": columns is None or columns.folded, "CAUSAL": o.causal,
        "SYMMETRIC": o.symmetric, "PRECISION": plan.precision(query.dtype, plan.width(max(c, c_v)), query.device),
    }  # fmt: skip
    return Call(layout, layout.block(query), layout.block(key), layout.block(value), planes, sizes, constants)


def _positions(positions: Tensor | None) -> Tensor | None:
    """Positions in a dtype in which differences do not wrap around."""
    if positions is None or positions.dtype in (torch.int32, torch.int64, torch.float32, torch.float64):
        return positions
    return positions.float() if positions.is_floating_point() else positions.int()


def _aligned(values: Tensor) -> Tensor:
    """Values whose rows start at multiples of 16 bytes, copied where they do not: other loads are 5 times slower.

    What was expanded in batch or heads is taken back to size 1.
    """
    for dim in range(values.dim() - 2):
        if values.stride(dim) == 0:
            values = values.narrow(dim, 0, 1)
    step = 16 // values.element_size()
    strides = [stride for size, stride in zip(values.shape[:-1], values.stride()[:-1], strict=True) if size > 1]
    if values.stride(-1) == 1 and values.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in strides):
        return values
    n_k = values.shape[-1]
    padded = values.new_empty((*values.shape[:-1], -(-n_k // step) * step))[..., :n_k]
    return padded.copy_(values)


def _planes(values: Tensor) -> Tensor | None:
    """Values as a stack of planes `(planes, rows, columns)`, where a tensor descriptor can read them; else None."""
    if values.shape[-2] == 1 or not plan.has_descriptors(values.device):
        return None
    planes = values.flatten(0, -3) if values.dim() > 2 else values[None]
    in_place = planes.data_ptr() == values.data_ptr()  # batch dimensions that do not lie in one line are copied
    return planes if in_place else None


def _count_planes(values: Block, planes: Tensor) -> Block:
    """The block of values with strides in planes; rows and columns are the descriptor's."""
    outer, inner, head, _ = (stride // max(planes.stride(0), 1) for stride in values.stride)
    return Block(values.ptr, (outer, inner, head, 0))
