"""From operands to launches: layout, columns, tiles, and the order of the kernels."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
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

from .backward import delta_kernel, keys_kernel, queries_kernel, values_kernel
from .columns import gradient_columns, score_columns
from .forward import forward_kernel
from .layout import Layout, reduce_to
from .terms import Block, Masks, Terms

DELTA_ROWS = 64


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
        """Whether rows are long."""
        return self.sizes["n_k"] >= plan.LONG

    def tiles(self, kind: str, query: Tensor) -> plan.Tiles:
        """The tiles of a kernel for this call."""
        terms, masks = self.sizes["terms"], self.sizes["masks"]
        traits = {
            "LONG": self.long,
            "DENSE": terms.matrix is not None,
            "ALLOWED": masks.allowed is not None,
            "SLOPES": terms.slopes is not None,
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


def forward(query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float) -> tuple[Tensor, Tensor]:
    """Output `(*batch, H, Nq, Cv)` and LSE `(*batch, H, Nq)`; arguments as `ops.attention` has them."""
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() == 0 or key.shape[-2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    call = prepare(query, key, value, operands, scale)
    tiles = call.tiles("forward", query)
    with _on(query):
        forward_kernel[(plan.cdiv(query.shape[-2], tiles.block_m) * query.shape[:-2].numel(),)](
            call.q,
            call.k,
            call.v,
            out,
            lse,
            tiles=call.descriptor(tiles),
            LONG=call.long,
            **call.sizes,
            **call.constants,
            **tiles.options(),
        )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Operands,
    scale: float,
    names: set[str],
) -> dict[str, Tensor]:
    """Gradients of the inputs in `names`, in their shapes. No atomics: what is shared is summed in a fixed order."""
    inputs = {"query": query, "key": key, "value": value, **vars(operands)}
    if out.numel() == 0 or key.numel() == 0:
        return {name: torch.zeros_like(inputs[name]) for name in names}
    call = prepare(query, key, value, operands, scale, values_gradient="values" in names)
    rows = query.shape[:-2].numel()
    delta = torch.empty_like(lse)
    low = torch.zeros_like(lse) if query.dtype == torch.float32 else None
    d_lse = None if grad_lse is None else grad_lse.contiguous()
    statistics = {"d_out": call.layout.block(grad_out), "d_lse": d_lse, "lse": lse, "low": low, "delta": delta}
    gradients: dict[str, Tensor | None] = {}
    with _on(query):
        delta_kernel[(plan.cdiv(query.shape[-2], DELTA_ROWS) * rows,)](
            statistics["d_out"], call.layout.block(out), delta,
            query.shape[-2], call.layout.inner, query.shape[-3], C_V=out.shape[-1],
            WIDTH_V=call.constants["WIDTH_V"], BLOCK_M=DELTA_ROWS,
        )  # fmt: skip
        # First the queries' side, which improves the statistics for the others where their gradients need it.
        if names & {"query", "slopes", "q_factor", "k_factor"} or low is not None:
            made = {
                "d_query": torch.empty_like(query, memory_format=torch.contiguous_format) if "query" in names else None,
                "d_slopes": torch.empty_like(lse) if "slopes" in names else None,
            }
            factor = operands.k_factor if "q_factor" in names else None
            gradients["q_factor"] = _walk(
                queries_kernel, "queries", query, query.shape[-2], factor, call, made, statistics
            )
            gradients["query"] = made["d_query"]
            gradients["slopes"] = None if made["d_slopes"] is None else made["d_slopes"].sum(-1, dtype=torch.float64)
        if names & {"key", "value", "k_factor"}:
            made = {
                "d_key": _per_head(query, key) if "key" in names else None,
                "d_value": _per_head(query, value) if "value" in names else None,
            }
            factor = operands.q_factor if "k_factor" in names else None
            gradients["k_factor"] = _walk(keys_kernel, "keys", query, key.shape[-2], factor, call, made, statistics)
            gradients["key"] = _sum_groups(made["d_key"], key)
            gradients["value"] = _sum_groups(made["d_value"], value)
        if "values" in names and operands.values is not None:
            gradients["values"] = _values_gradient(query, key.shape[-2], operands.values, call, statistics)
    return {name: reduce_to(gradients[name], inputs[name].shape) for name in names}


def _walk(
    kernel: Any, kind: str, query: Tensor, n_rows: int, factor: Tensor | None, call: Call,
    made: dict[str, Tensor | None], statistics: dict[str, Any],
) -> Tensor | None:  # fmt: skip
    """Launch a kernel that fills the tensors `made`, and return the gradient of the factor opposite to `factor`.

    That gradient is as wide as `factor` has columns: beyond a slice of them, the kernel runs again for the next.
    """
    tiles = call.tiles(kind, query)
    side = None if factor is None else gradient_columns(factor, query.dtype, tiles.columns)
    parts = []
    for start, stop in plan.slices(0 if side is None else side.columns.shape[-1]):
        columns, d_columns = None, None
        if side is not None:
            columns = call.layout.block(side.columns[..., start:stop])
            d_columns = query.new_empty((*query.shape[:-2], n_rows, stop - start), dtype=torch.float32)
            parts.append(d_columns)
        constants = call.constants | {"GRADIENT_RANK": stop - start, "SPLIT": side is not None and side.parts == 2}
        block = tiles.block_m if kind == "queries" else tiles.block_n
        kernel[(plan.cdiv(n_rows, block) * query.shape[:-2].numel(),)](
            call.q, call.k, call.v, d_columns=d_columns, gradient_columns=columns, **made, **statistics, **call.sizes,
            **constants, **tiles.options(), tiles=call.descriptor(tiles),
        )  # fmt: skip
        made = dict.fromkeys(made)
    return None if side is None else side.combine(torch.cat(parts, -1))


def _values_gradient(query: Tensor, n_k: int, values: Tensor, call: Call, statistics: dict[str, Any]) -> Tensor:
    """The gradient of a dense bias, in its shape: one program sums one tile over all that shares it."""
    layout, n_q = call.layout, query.shape[-2]
    own = layout.sizes(values)
    shared = [full // size for full, size in zip((layout.outer, layout.inner, layout.heads), own, strict=True)]
    one_row = values.shape[-2] == 1 and n_q > 1
    constants = call.constants | {"ONE_ROW": one_row}
    tiles = call.tiles("values", query)
    n_m, n_n = plan.cdiv(n_q, tiles.block_m), plan.cdiv(n_k, tiles.block_n)
    programs = math.prod(own) * n_n * (1 if one_row else n_m)
    members = math.prod(shared) * (n_m if one_row else 1)
    splits = plan.splits(programs, members, query.device)
    planes = query.new_empty((splits, *own, values.shape[-2], n_k), dtype=torch.float32)
    values_kernel[(programs * splits,)](
        call.q, call.k, call.v, d_values=planes, n_outer_shared=shared[0], n_inner_shared=shared[1],
        n_heads_shared=shared[2], n_splits=splits, tiles=call.descriptor(tiles), **statistics, **call.sizes,
        **constants, **tiles.options(),
    )  # fmt: skip
    return planes.sum(0).reshape(values.shape)


def _per_head(query: Tensor, tensor: Tensor) -> Tensor:
    """Room for the gradient of keys or values for each query head; in fp32 where a group's are to be summed."""
    dtype = tensor.dtype if query.shape[-3] == tensor.shape[-3] else torch.float32
    return tensor.new_empty((*query.shape[:-2], *tensor.shape[-2:]), dtype=dtype)


def _sum_groups(gradient: Tensor | None, tensor: Tensor) -> Tensor | None:
    if gradient is None or gradient.shape == tensor.shape:
        return gradient
    return gradient.unflatten(-3, (tensor.shape[-3], -1)).sum(-3)


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


def _on(query: Tensor) -> AbstractContextManager[Any]:
    """The device of the tensors as the current one."""
    return torch.cuda.device(query.device) if query.is_cuda else nullcontext()
