"""A call on the CPU, cut into parts, and the scores of a part's blocks.

Every tensor is viewed as `(*batch, Hkv, G, ...)` with G the query heads that share a key head, each dimension its own
size or 1. The matrices of a part of `(*batch, Hkv)` are worked on together, some rows at a time, so that a block of
scores stays in the cache. Factors stand beside query and key, so that one product gives the scores and the bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .cpu_blocks import hide, multiply
from .diagonals import fold, spread, sum_diagonals
from .operands import Operands

# Scores of fp32 in a block for each of at most so many threads, and rows of a matrix in it: as a rule, and at least.
BLOCK = 1 << 20
MAX_THREADS = 8
ROWS = 128
MIN_ROWS = 16

# The tensors of a call, and their dimensions behind those of the batch and the heads; those of the second group have no
# heads. Slopes are given two dimensions more, a table one: a matrix of one row.
_OF_HEADS = {
    "query": 2, "key": 2, "value": 2, "q_factor": 2, "k_factor": 2, "slopes": 2, "values": 2, "table": 2, "allowed": 2,
}  # fmt: skip
_OF_BATCH = {"q_positions": 1, "k_positions": 1, "offsets": 0, "lengths": 0, "q_ids": 1, "k_ids": 1}

_ALL = slice(None)


class Part:
    """Some of the matrices of a call: `part[name]` are views of its tensors; query, key and value copies in the dtype
    of `space`, fp32 or float64, as is what is made of them.

    query: `(..., G, Nq, C + R)`, times scale. key: `(..., G or 1, Nk, C + R)`. value: `(..., 1, Nk, Cv)`.
    space: `(3, scores of a block)`.
    """

    def __init__(self, tensors: dict[str, Tensor], operands: Operands, scale: float, space: Tensor) -> None:
        self.tensors, self.operands, self.space = tensors, operands, space
        self.device, self.n_k = space.device, tensors["key"].shape[-2]
        self.offset: int | Tensor = tensors["offsets"].long() if "offsets" in tensors else operands.offset
        if "lengths" in tensors:
            # Nothing may come of what stands beyond the lengths, also not 0 * NaN.
            lengths = tensors["lengths"][..., None]
            inside = self.positions < lengths
            for name in ("key", "value", "k_factor", "k_positions"):
                if name in tensors:
                    shown = inside if name == "k_positions" else inside[..., None]
                    tensors[name] = torch.where(shown, tensors[name], 0)
            self.n_k = min(self.n_k, int(lengths.max()))
        dtype = space.dtype
        self.query = tensors["query"].to(dtype) * scale
        self.key, self.value = tensors["key"].to(dtype).contiguous(), tensors["value"].to(dtype).contiguous()
        if "q_factor" in tensors:
            self.query = _beside(self.query, tensors["q_factor"].to(dtype) * operands.factor_unit)
            self.key = _beside(self.key, tensors["k_factor"].to(dtype))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @cached_property
    def positions(self) -> Tensor:
        return torch.arange(self.tensors["key"].shape[-2], device=self.device)

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Slices of the rows, and up to which key they attend."""
        matrices, n_q = math.prod(self.query.shape[:-2]), self.query.shape[-2]
        step = max(1, self.space.shape[1] // (matrices * max(self.n_k, 1)))
        last = int(self.offset.max()) if isinstance(self.offset, Tensor) else self.offset
        for start in range(0, n_q, step):
            stop = min(start + step, n_q)
            n = min(self.n_k, stop + last) if self.operands.causal else self.n_k
            if n > 0:
                yield slice(start, stop), n

    def diagonal(self, rows: slice) -> Tensor:
        """`i + offset`, `(..., 1, 1, rows)` or `(rows,)`."""
        if not isinstance(self.offset, Tensor):
            return torch.arange(rows.start + self.offset, rows.stop + self.offset, device=self.device)
        return torch.arange(rows.start, rows.stop, device=self.device) + self.offset[..., None]

    def distance(self, rows: slice, n: int) -> Tensor | None:
        """`p_j - p_i`, or its negative absolute value: differences of integers are exact."""
        if "slopes" not in self.tensors:
            return None
        q_positions, k_positions = self.diagonal(rows), self.positions[:n]
        if "q_positions" in self.tensors:
            q_positions, k_positions = _wide(self["q_positions"][..., rows]), _wide(self["k_positions"][..., :n])
        distance = (k_positions[..., None, :] - q_positions[..., :, None]).to(self.space.dtype)
        return distance.abs().neg_() if self.operands.symmetric else distance

    def smallest(self, rows: slice) -> int | Tensor:
        """The distance of a block's last row to the first key, `(..., 1, 1)` or one for all."""
        return 1 - rows.stop - self.offset

    def scores(self, rows: slice, n: int, distance: Tensor | None) -> Tensor:
        """Scores with bias and mask, `(..., G, rows, n)`."""
        scores = multiply(self.query[..., rows, :], self.key[..., :n, :].mT, self.space[0])
        if distance is not None:
            scores.addcmul_(self["slopes"], distance)
        if "values" in self.tensors:
            scores.add_(_block(self["values"], rows, slice(n)))
        if "table" in self.tensors:
            scores.add_(spread(self["table"].squeeze(-2), self.smallest(rows), rows.stop - rows.start, n))
        for first, allowed in self.masks(rows, n):
            hide(scores[..., first:], allowed)
        return scores

    def masks(self, rows: slice, n: int) -> Iterator[tuple[int, Tensor]]:
        """A column from which on booleans hold, and the booleans, which broadcast to the block from there on."""
        if "allowed" in self.tensors:
            yield 0, _block(self["allowed"], rows, slice(n))
        if "lengths" in self.tensors:
            first = max(int(self["lengths"].min()), 0)
            yield first, self.positions[first:n] < self["lengths"][..., None, None]
        if "q_ids" in self.tensors:
            q_ids, k_ids = self["q_ids"][..., rows, None], self["k_ids"][..., None, :n]
            yield 0, (q_ids == k_ids) & (q_ids != -1)
        if self.operands.causal:
            least = int(self.offset.min()) if isinstance(self.offset, Tensor) else self.offset
            first = max(rows.start + least + 1, 0)
            yield first, self.positions[first:n] <= self.diagonal(rows)[..., None]

    def add(self, name: str, gradient: Tensor, rows: slice = _ALL, columns: slice = _ALL) -> None:
        """Add to the gradient of this name, where it is wanted, summed over what was broadcast."""
        if f"grad {name}" in self.tensors:
            total = _block(self[f"grad {name}"], rows, columns)
            total += gradient.sum_to_size(total.shape)

    def add_table(self, d_scores: Tensor, rows: slice) -> None:
        """Add to the gradient of the table, where it is wanted, from that of a block of scores."""
        if "grad table" in self.tensors:
            sums = sum_diagonals(d_scores)
            self.add("table", fold(sums, self.smallest(rows), self["table"].shape[-1]).unsqueeze(-2))


def parts(
    query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float, extra: dict[str, tuple[Tensor, int]],
    dtype: torch.dtype = torch.float32,
) -> Iterator[Part]:  # fmt: skip
    """A call in parts that compute in a dtype; `extra` tensors come with their dimensions behind the heads."""
    (*batch, heads, n_q, _), kv_heads, n_k = query.shape, key.shape[-3], key.shape[-2]
    if query.shape[:-1].numel() == 0 or n_k == 0:
        return
    tensors = dict(extra)
    for name, tensor in {"query": query, "key": key, "value": value, **vars(operands)}.items():
        if isinstance(tensor, Tensor) and name in _OF_BATCH:
            tensors[name] = tensor.unsqueeze(tensor.dim() - _OF_BATCH[name]), _OF_BATCH[name]
        elif isinstance(tensor, Tensor):
            tensors[name] = as_matrices(name, tensor), _OF_HEADS[name]
    views = {name: _view(tensor, behind, len(batch), kv_heads) for name, (tensor, behind) in tensors.items()}
    row = heads // kv_heads * n_k
    block = BLOCK * torch.float32.itemsize // dtype.itemsize
    budget = max(block * min(torch.get_num_threads(), MAX_THREADS), MIN_ROWS * row)
    space = query.new_empty((3, min(budget, math.prod(batch) * heads * n_q * n_k)), dtype=dtype)
    most = budget // (row * min(n_q, ROWS))
    if most >= math.prod(batch) * kv_heads:  # as in decoding, where a view takes as long as the arithmetic
        yield Part(views, operands, scale, space)
        return
    for chunk in _chunks((*batch, kv_heads), most):
        yield Part({name: _narrow(view, chunk) for name, view in views.items()}, operands, scale, space)


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """The tensor, slopes as matrices of one entry, tables of one row."""
    if name == "slopes":
        return tensor[..., None, None]
    return tensor[..., None, :] if name == "table" else tensor


def _view(tensor: Tensor, behind: int, batch: int, kv_heads: int) -> Tensor:
    """`(*batch, H, ...)` as `(*batch, Hkv, G, ...)`, missing dimensions as 1."""
    front = tensor.dim() - behind
    if front == 0:
        tensor, front = tensor[None], 1
    size = tensor.shape[front - 1]
    if size > kv_heads and size % kv_heads == 0:
        tensor = tensor.unflatten(front - 1, (kv_heads, size // kv_heads))
    else:
        tensor = tensor.unsqueeze(front)
    return tensor[(None,) * (batch + 1 - front)] if front <= batch else tensor


def _chunks(sizes: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Slices that cut an array of these sizes into parts of at most so many entries, or of one."""
    if not sizes:
        yield ()
        return
    rest = math.prod(sizes[1:])
    step = max(1, most // rest)
    for start in range(0, sizes[0], step):
        for others in [(_ALL,) * (len(sizes) - 1)] if rest <= most else _chunks(sizes[1:], most):
            yield slice(start, min(start + step, sizes[0])), *others


def _narrow(view: Tensor, chunk: tuple[slice, ...]) -> Tensor:
    return view[tuple(_ALL if size == 1 else part for part, size in zip(chunk, view.shape, strict=False))]


def _block(tensor: Tensor, rows: slice, columns: slice) -> Tensor:
    """Some rows and columns; all rows where there is one for all queries."""
    return tensor[..., _ALL if tensor.shape[-2] == 1 else rows, columns]


def _beside(first: Tensor, second: Tensor) -> Tensor:
    """Two matrices side by side, in dimensions broadcast against each other."""
    shape = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    return torch.cat([matrix.expand(*shape, matrix.shape[-1]) for matrix in (first, second)], -1)


def _wide(positions: Tensor) -> Tensor:
    """Positions in a dtype in which their differences are exact, or as good as can be."""
    if positions.is_floating_point():
        return positions if positions.dtype == torch.float64 else positions.float()
    return positions.long()
