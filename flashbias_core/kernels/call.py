"""One call of the operator as its kernels take it: blocks, sizes, constants, and which tiles.

All that does not depend on what the tensors hold is found once for each way in which they can lie (`Frame`): an eager
call should take the host less time than the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from flashbias import plan
from flashbias.operands import Operands
from flashbias.tiles import Tiles

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # triton 3.3 has none that the host can make
    TensorDescriptor = None

from . import compiled, replay
from .columns import score_columns
from .compiled import Known, kind, kinds, size_kind
from .geometry import Geometry, geometry
from .layout import Axes, Layout
from .passes import with_tensor, without_tensor
from .replay import contiguous, done
from .rows import are_abreast, in_rows
from .terms import Block, Masks, Terms

PER_HEAD = Axes(row=False, column=False)
PER_POSITION = Axes(head=False, column=False)
PER_BATCH = Axes(head=False, row=False, column=False)
# The tensors that a call reads, in the order of a frame's.
INPUTS = {"query": Axes(), "key": Axes(), "value": Axes()}
TERMS = {
    "q_columns": Axes(), "k_columns": Axes(), "slopes": PER_HEAD, "q_positions": PER_POSITION,
    "k_positions": PER_POSITION, "values": Axes(), "table": Axes(row=False),
}  # fmt: skip
MASKS = {
    "offsets": PER_BATCH, "lengths": PER_BATCH, "q_ids": PER_POSITION, "k_ids": PER_POSITION, "allowed": Axes(),
}  # fmt: skip
AXES = INPUTS | TERMS | MASKS
MATRICES = ("values", "allowed")
FRAMES = 2048  # at most, each of a few kilobytes
_COMPILED: dict[Hashable, dict[Hashable, Known]] = {}  # does not grow with the number of lengths


@dataclass
class Frame:
    """What calls have in common whose tensors lie in the same way.

    strides: of the blocks, in the order of `AXES`; None where there is no tensor, or it has to be copied first.
    planes: shape and strides of a dense bias as a tensor descriptor reads it; None where it does not.
    tensors: shapes and strides of queries, keys, values, factor columns and dense bias as tensor descriptors read them;
    None where they do not.
    sizes, constants: arguments of the kernels. traits: what `plan.tiles` wants to know beside.
    compiled: kernels that were launched before, for this frame or one of other lengths, by what else their code depends
    on. found: what `once` was asked for.
    """

    layout: Layout
    strides: tuple[tuple[int, int, int, int] | None, ...]
    planes: tuple[list[int], list[int]] | None
    tensors: dict[str, tuple[list[int], list[int]] | None]
    sizes: dict[str, Any]
    constants: dict[str, Any]
    traits: dict[str, Any]
    compiled: dict[Hashable, Known]
    found: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, what: Hashable, find: Callable[[], Any]) -> Any:
        """What `find()` gives, the same for all calls of a frame, is looked for once."""
        if what not in self.found:
            self.found[what] = find()
        return self.found[what]


@lru_cache(maxsize=FRAMES)
def _frame(
    device: torch.device,
    scale: float,
    offset: int,
    symmetric: bool,
    causal: bool,
    folded: bool,
    descriptors: bool,
    values_shape: tuple[int, ...] | None,
    *geometries: tuple[Any, ...] | None,
) -> Frame:
    """The frame of a call; `geometries` in the order of `AXES`, `values_shape` if their gradient is wanted.

    `descriptors`: whether there are any.
    """
    lie = {name: Geometry(*known) for name, known in zip(AXES, geometries, strict=True) if known is not None}
    query, key, value = (lie[name] for name in INPUTS)
    given = {name: (known, AXES[name]) for name, known in lie.items()}
    matrices = [given[name] for name in MATRICES if name in given]
    if values_shape is not None:
        # The gradient is laid out by the shape of the values, whatever their strides.
        contiguous = torch.empty(values_shape, device="meta").stride()
        matrices.append((Geometry(values_shape, contiguous, torch.float32, 0), Axes()))
    heads, n_q, c = query.shape[-3:]
    n_k, c_v = value.shape[-2:]
    layout = Layout(query.shape[:-3], heads, [given[name] for name in given if name not in MATRICES], matrices)
    rank = lie["k_columns"].shape[-1] if "k_columns" in lie else 0
    sizes = {
        "n_q": n_q, "n_k": n_k, "n_inner": layout.inner, "n_heads": heads, "group": heads // max(key.shape[-3], 1),
        "offset": offset, "unit": scale,
    }  # fmt: skip
    constants = _constants(device, query.dtype, c, c_v, rank, folded, causal, symmetric)
    traits = {
        "LONG": n_k >= plan.LONG and "values" not in given,  # a dense bias takes registers too
        "DENSE": "values" in given,
        "ALLOWED": "allowed" in given,
        "POSITIONS": "q_positions" in given or "q_ids" in given,
        "SLOPES": "slopes" in given,
        "TABLE": "table" in given,
        "FEW": n_q <= plan.FEW,
    }
    traits["BARE"] = not (causal or traits["ALLOWED"] or "q_ids" in given or traits["SLOPES"])
    strides = {name: layout.strides(known, axes) for name, (known, axes) in given.items()}
    planes = _planes(given["values"][0]) if descriptors and strides.get("values") else None
    if planes is not None:
        strides["values"] = _count_planes(strides["values"], planes[1][0])
    copied = [name for name in (*INPUTS, "q_columns", "k_columns") if name in lie]
    tensors = {name: described(lie[name], strides[name], layout) for name in copied}
    if planes is not None:  # one for each head, or for all: else the call is not `PLAIN`
        shape, stride = planes
        tensors["values"] = [1, 1, *shape], [stride[0], stride[0], *stride]
    plain = set(given) <= {*INPUTS, "q_columns", "k_columns", "slopes"} and not symmetric
    if planes is not None and set(given) == {*INPUTS, "values"} and traits["BARE"]:
        known = given["values"][0]
        plain = prod(known.shape[:-3]) == 1 and known.dtype.itemsize == 2
    traits["PLAIN"] = plain and None not in tensors.values()
    reach = lie["table"].shape[-1] // 2 if "table" in lie else None
    seen = tuple((name, known.dtype, known.place, kind(strides[name])) for name, known in lie.items())
    code = device, *constants.values(), planes is None, kind(reach), *map(size_kind, sizes.values()), *seen
    # Of what is copied first the strides are not known yet.
    compiled = {} if None in strides.values() else _COMPILED.setdefault(code, {})
    return Frame(layout, tuple(map(strides.get, AXES)), planes, tensors, sizes, constants, constants | traits, compiled)


@lru_cache(maxsize=FRAMES)
def _constants(
    device: torch.device, dtype: torch.dtype, c: int, c_v: int, rank: int, folded: bool, causal: bool, symmetric: bool
) -> dict[str, Any]:
    """Constants of all kernels of a call, the same for all lengths."""
    return {
        "C": c, "C_V": c_v, "RANK": rank, "WIDTH": plan.width(c), "WIDTH_V": plan.width(c_v),
        "CHUNK": plan.chunk(rank), "FOLDED": folded, "CAUSAL": causal, "SYMMETRIC": symmetric,
        "PRECISION": plan.precision(dtype, plan.width(max(c, c_v)), device), "SUMS": plan.sums_doubles(dtype, device),
    }  # fmt: skip


def forget() -> None:
    """Decide anew how calls are made; kernels stay compiled."""
    _frame.cache_clear()
    _constants.cache_clear()
    replay.forget()


@dataclass
class Call:
    """What all kernels of one call take."""

    frame: Frame
    q: Block
    k: Block
    v: Block
    values: Tensor | None
    terms: Terms
    masks: Masks

    def tiles(self, kind: str, query: Tensor) -> Tiles:
        """The tiles of a kernel for this call."""
        traits = self.frame.traits
        return self.frame.once(kind, lambda: plan.tiles(kind, query.device, query.dtype, traits))

    def teams(self, kind: str, query: Tensor) -> Tiles | None:
        """The tiles with which teams serve this call, or None."""
        frame = self.frame
        return frame.once((kind, "teams"), lambda: plan.teams(kind, query, frame.sizes["n_k"], frame.traits))

    def descriptor(self, tiles: Tiles) -> Any:
        """How a dense bias is read tile by tile: a tensor descriptor, or None for pointers or no such bias."""
        planes, values = self.frame.planes, self.values
        if planes is None or values is None:
            return None
        tile = [1, tiles.block_m, tiles.block_n]
        like = self.frame.once(("tile", *tile), lambda: without_tensor(TensorDescriptor(values, *planes, tile)))
        return with_tensor(like, values)  # of tensors that lie alike only the first is checked

    def lie(self, block: Block) -> tuple[list[int], list[int]] | None:
        """Shape and strides of a block as a tensor descriptor reads it; None where hardware could not copy tiles."""
        known = geometry(block.ptr)
        return self.frame.once(
            (known, block.stride), lambda: described(Geometry(*known), block.stride, self.frame.layout)
        )

    def launch(self, kernel: Any, grid: tuple[int, int], tiles: Tiles | None = None, **arguments: Any) -> None:
        """Launch a kernel with these arguments; with tiles, also with all that the kernels of a call have in common."""
        key = (id(kernel), tiles, *kinds(kernel, arguments))
        constants: Callable[[], dict[str, Any]] = dict
        if tiles is not None:
            arguments |= {"q": self.q, "k": self.k, "v": self.v, "tiles": self.descriptor(tiles)}
            arguments |= {"terms": self.terms, "masks": self.masks}
            arguments.update(self.frame.sizes)
            constants = partial(_common, self.frame, tiles)
        compiled.launch(kernel, grid, arguments, constants, self.frame.compiled, key)


def _common(frame: Frame, tiles: Tiles) -> dict[str, Any]:
    return frame.constants | tiles.options()


def prepare(
    query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float, *, values_gradient: bool = False
) -> Call:
    """The blocks and constants of a call."""
    o = operands
    columns = None
    if o.q_factor is not None and o.k_factor is not None:
        columns = score_columns(o.q_factor, o.k_factor, query.dtype, scale / o.factor_unit)
    values = None if o.values is None else _aligned(o.values)
    allowed = o.allowed.view(torch.uint8) if o.allowed is not None and o.allowed.dtype == torch.bool else o.allowed
    if allowed is not None and allowed.stride(-1) != 1:
        allowed = contiguous(allowed)
    q_columns, k_columns, folded = (columns.q, columns.k, columns.folded) if columns else (None, None, True)
    tensors = (
        query, key, value,
        q_columns, k_columns, o.slopes, _positions(o.q_positions), _positions(o.k_positions), values,
        o.table, o.offsets, o.lengths, o.q_ids, o.k_ids, allowed,
    )  # fmt: skip
    frame = _frame(
        query.device, scale, o.offset, o.symmetric, o.causal, folded, plan.has_descriptors(query.device),
        o.values.shape if values_gradient and o.values is not None else None,
        *[None if tensor is None else geometry(tensor) for tensor in tensors],
    )  # fmt: skip
    blocks: list[Any] = [
        None if tensor is None else Block(tensor, *strides) if strides else frame.layout.block(tensor, axes)
        for tensor, strides, axes in zip(tensors, frame.strides, AXES.values(), strict=True)
    ]
    q, k, v = blocks[: len(INPUTS)]
    reach = None if o.table is None else o.table.shape[-1] // 2
    terms = Terms(*(*blocks[len(INPUTS) : -len(MASKS)], reach))
    return Call(frame, q, k, v, values, terms, Masks(*blocks[-len(MASKS) :]))


def _positions(positions: Tensor | None) -> Tensor | None:
    """Positions in a dtype in which differences do not wrap around."""
    if positions is None or positions.dtype in (torch.int32, torch.int64, torch.float32, torch.float64):
        return positions
    return done(Tensor.float if positions.is_floating_point() else Tensor.int, positions)


def row_step(n_q: int, itemsize: int) -> int:
    """Rows of a dense bias start at multiples of so many entries: of 16 bytes.

    A single row, at multiples of 16 entries: triton compiles strides that are no such multiples anew.
    """
    return 16 if n_q == 1 else 16 // itemsize


def _aligned(values: Tensor) -> Tensor:
    """Values whose rows start at multiples of 16 bytes, copied where they do not: other loads are 5 times slower.

    What was expanded in batch or heads is taken back to size 1.
    """
    for dim in range(values.dim() - 2):
        if values.stride(dim) == 0:
            values = values.narrow(dim, 0, 1)
    n_q, n_k = values.shape[-2:]
    step = row_step(n_q, values.element_size())
    if values.data_ptr() % 16 == 0 and _in_steps(values.shape, values.stride(), step):
        _load_copy(values.device, values.dtype)
        return values
    width = plan.cdiv(n_k, step) * step
    return in_rows(values, width) if are_abreast(values) else done(_padded, values, width)


def _padded(values: Tensor, width: int) -> Tensor:
    """A copy whose rows are `width` entries apart."""
    return values.new_empty((*values.shape[:-1], width))[..., : values.shape[-1]].copy_(values)


@cache
def _load_copy(device: torch.device, dtype: torch.dtype) -> None:
    """Have torch load its kernel for the copy above with the first call, which takes seconds: 10 to 40 milliseconds."""
    torch.empty((2, 2), dtype=dtype, device=device)[:, :1].copy_(torch.empty((2, 1), dtype=dtype, device=device))


@lru_cache(maxsize=FRAMES)
def _in_steps(shape: tuple[int, ...], stride: tuple[int, ...], step: int) -> bool:
    """Whether columns are contiguous, and other strides multiples of `step`."""
    others = zip(shape[:-1], stride[:-1], strict=True)
    return stride[-1] == 1 and all(size == 1 or stride % step == 0 for size, stride in others)


def _planes(values: Geometry) -> tuple[list[int], list[int]] | None:
    """Shape and strides of values as a stack of planes `(planes, rows, columns)`, where they are one; else None."""
    *outer, (n_q, row), (n_k, column) = zip(values.shape, values.stride, strict=True)
    outer = [(size, stride) for size, stride in outer if size != 1]
    in_line = all(left == size * right for (_, left), (size, right) in pairwise(outer))
    if n_q == 1 or not in_line:
        return None
    plane = outer[-1][1] if outer else n_q * row
    return [prod(size for size, _ in outer), n_q, n_k], [plane, row, column]


def described(
    known: Geometry, strides: tuple[int, int, int, int] | None, layout: Layout
) -> tuple[list[int], list[int]] | None:
    """Shape and strides over outer and inner batch, head, row, column; None where hardware could not copy tiles."""
    if strides is None or known.place:
        return None
    outer, inner, head, row = strides
    if not row or (outer | inner | head | row) * known.dtype.itemsize % 16:  # one that is no multiple of 16 bytes
        return None
    heads, n_rows, columns = (1, *known.shape)[-3:]
    sizes = layout.outer if outer else 1, layout.inner if inner else 1, heads if head else 1
    # Of a dimension of size 1 the stride is of no use, but has to be one.
    return [*sizes, n_rows, columns], [outer or row, inner or row, head or row, row, 1]


def _count_planes(strides: tuple[int, int, int, int] | None, plane: int) -> tuple[int, int, int, int]:
    """Strides of values in planes; rows and columns are the descriptor's."""
    assert strides is not None  # since they were not copied
    outer, inner, head, _ = (stride // max(plane, 1) for stride in strides)
    return outer, inner, head, 0
