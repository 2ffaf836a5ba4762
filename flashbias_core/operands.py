"""What one call of the operator works on: at most one term of each kind, and one mask of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .biases import Bias
from .checks import check_broadcast, check_device, check_last
from .errors import DtypeError, UnsupportedError
from .masks import Allowed, Causal, KeyPadding, Mask, Segments
from .terms import Linear, Problem, Rank, Table, Term, Tile

TOTALS = {"slopes", "table"}  # of whose gradients each number is a sum over all scores


@dataclass
class Operands:
    """The terms and masks of a call, in the order in which `ops.py` takes them. Batch and head dimensions broadcast.

    q_factor, k_factor: `(*batch, H, N, R)`, fp16, bf16 or fp32, beside queries in fp32 also float64; their product
        counts `factor_unit` times.
    slopes: `(*batch, H)` fp32; positions `(*batch, N)`, or None for `p_j = j`, `p_i = i + offset`.
    values: `(*batch, H, Nq or 1, Nk)`. table: `(*batch, H, 2 D - 1)` fp32.
    offsets: `(*batch,)` integers in place of `offset`.
    lengths: `(*batch,)`; q_ids, k_ids `(*batch, N)`; allowed: booleans `(*batch, H, Nq or 1, Nk)`.
    """

    q_factor: Tensor | None = None
    k_factor: Tensor | None = None
    slopes: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    values: Tensor | None = None
    table: Tensor | None = None
    offsets: Tensor | None = None
    lengths: Tensor | None = None
    q_ids: Tensor | None = None
    k_ids: Tensor | None = None
    allowed: Tensor | None = None
    symmetric: bool = False
    causal: bool = False
    offset: int = 0
    factor_unit: float = 1.0

    @property
    def in_doubles(self) -> bool:
        """Whether the factors, if there are any, are in float64."""
        return self.q_factor is not None and self.q_factor.dtype == torch.float64

    def in_order(self) -> list[Any]:
        """Values in the order of the operator's schema."""
        return [getattr(self, name) for name in _NAMES]

    def items(self) -> list[tuple[str, Any]]:
        """Names and values in the order of the operator's schema, as `vars`, which breaks the graphs of torch 2.7."""
        return [(name, getattr(self, name)) for name in _NAMES]


_NAMES = tuple(field.name for field in fields(Operands))
# What may be a tensor in a part of a call. To ask each for all names would take the host longer than the rest.
_TENSORS: dict[type, tuple[str, ...]] = {
    Causal: ("offset",), KeyPadding: ("lengths",), Segments: ("q_ids", "k_ids"), Allowed: ("allowed",),
    Rank: ("q_factor", "k_factor"), Linear: ("slopes", "q_positions", "k_positions"), Tile: ("values",),
    Table: ("table",),
}  # fmt: skip


def gather(
    bias: Bias | None, mask: Mask | None, batch: Sequence[int], heads: int, query: Tensor, key: Tensor,
    scale: float | None = None,
) -> Operands:  # fmt: skip
    """The operands of a call: sums merged, shapes checked. With `scale` factors may come over it.

    Raises:
        ShapeError, DeviceError, UnsupportedError: for a bias or a mask that does not fit.
    """
    n_q, n_k = query.shape[-2], key.shape[-2]
    exact = query.dtype == torch.float32
    problem = Problem(tuple(batch), heads, n_q, n_k, n_k - n_q, query.device, exact=exact)
    operands = Operands(offset=n_k - n_q)
    if mask is not None:
        for part in mask.parts():
            _check_devices(part, problem)
            _add_mask(operands, part, problem)
        problem.q_ids, problem.k_ids, problem.lengths = operands.q_ids, operands.k_ids, operands.lengths
    if bias is not None:
        if not isinstance(bias, Bias):
            raise DtypeError(
                f"bias of type {type(bias).__name__}",
                "a flashbias.Bias, or a sum of them",
                "pass a tensor of bias values as bias=DenseBias(values)",
            )
        if len(tuple(bias.parts())) == 1 and query.dtype.itemsize == 2:
            problem.unit = scale
        for term in bias.terms(problem):
            _check_devices(term, problem)
            _add_term(operands, term, problem)
    if operands.k_factor is not None and operands.q_factor is not None:
        # What stands at positions that no row or column uses may be anything, also NaN.
        operands.q_factor = _zero_beyond(operands.q_factor, problem.q_counts)
        operands.k_factor = _zero_beyond(operands.k_factor, problem.k_counts)
    return operands


def _check_devices(part: Mask | Term, problem: Problem) -> None:
    """Raise `DeviceError` for a tensor that is not where query is, before it meets others."""
    for name in _TENSORS.get(type(part), _NAMES):
        value = getattr(part, name, None)
        if isinstance(value, Tensor):
            check_device(name, value, problem.device)


def _add_mask(operands: Operands, mask: Mask, problem: Problem) -> None:
    batch, n_q, n_k = problem.batch, problem.n_q, problem.n_k
    if isinstance(mask, Causal):
        offset = n_k - n_q if mask.offset is None else mask.offset
        if isinstance(offset, Tensor):
            check_broadcast("offset", offset, batch, "(*batch,)")
        if operands.causal:
            offset = _smaller(offset, operands.offset if operands.offsets is None else operands.offsets)
        operands.causal = True
        operands.offset, operands.offsets = (0, offset) if isinstance(offset, Tensor) else (offset, None)
        problem.offset = offset
    elif isinstance(mask, KeyPadding):
        check_broadcast("lengths", mask.lengths, batch, "(*batch,)")
        lengths = mask.lengths
        operands.lengths = lengths if operands.lengths is None else torch.minimum(lengths, operands.lengths)
    elif isinstance(mask, Segments):
        for name, ids, n, meaning in (("q_ids", mask.q_ids, n_q, "Nq"), ("k_ids", mask.k_ids, n_k, "Nk")):
            check_last(name, ids, (n,), f"({meaning},)")
            check_broadcast(name, ids, (*batch, n), f"(*batch, {meaning})")
        operands.q_ids, operands.k_ids = _join(mask.q_ids, operands.q_ids), _join(mask.k_ids, operands.k_ids)
    elif isinstance(mask, Allowed):
        check_last("mask", mask.allowed, (n_k,), "(Nk,)")
        check_broadcast("mask", mask.allowed, (*batch, problem.heads, n_q, n_k), "(*batch, H, Nq, Nk)")
        allowed = mask.allowed[(None,) * max(0, 2 - mask.allowed.dim())]
        operands.allowed = allowed if operands.allowed is None else operands.allowed & allowed
    else:
        raise UnsupportedError(
            f"a mask of type {type(mask).__name__}",
            "Causal, KeyPadding, Segments or a boolean tensor",
            "pass mask.dense(n_q, n_k)",
        )


def _smaller(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    if isinstance(a, Tensor):
        return a.long().clamp(max=b)
    return b.long().clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def _join(ids: Tensor, others: Tensor | None) -> Tensor:
    """Ids that are equal where both are, and -1 where one is."""
    if others is None:
        return ids.int() if ids.dtype in (torch.int64, torch.uint8) else ids
    ids, others = ids.long(), others.long()
    return torch.where((ids == -1) | (others == -1), -1, (ids << 32) | (others & 0xFFFFFFFF))


def _zero_beyond(factor: Tensor, counts: Tensor | None) -> Tensor:
    return factor if counts is None else torch.where(counts[..., None, :, None], factor, 0.0)


def _add_term(operands: Operands, term: Term, problem: Problem) -> None:
    if isinstance(term, Rank):
        factors = _storage(term.q_factor, problem.exact), _storage(term.k_factor, problem.exact)
        if factors[0].dtype != factors[1].dtype:
            dtype = torch.promote_types(factors[0].dtype, factors[1].dtype)
            factors = factors[0].to(dtype), factors[1].to(dtype)
        if operands.q_factor is None or operands.k_factor is None:
            operands.q_factor, operands.k_factor, operands.factor_unit = *factors, term.unit
        else:
            whole = _times(operands.q_factor, operands.factor_unit), _times(factors[0], term.unit)
            operands.q_factor, operands.factor_unit = _columns(*whole), 1.0
            operands.k_factor = _columns(operands.k_factor, factors[1])
    elif isinstance(term, Linear):
        if operands.slopes is None:
            operands.slopes, operands.symmetric = term.slopes, term.symmetric
            operands.q_positions, operands.k_positions = term.q_positions, term.k_positions
        elif (
            operands.symmetric == term.symmetric
            and operands.q_positions is term.q_positions
            and operands.k_positions is term.k_positions
        ):
            operands.slopes = operands.slopes + term.slopes
        else:
            raise UnsupportedError(
                "a sum of ALiBi biases that differ in positions or symmetry",
                "at most one ALiBi, or several over the same position tensors with the same symmetry",
                "give one of them as FactoredBias or DenseBias",
            )
    elif isinstance(term, Tile):
        values = _storage(term.values)
        operands.values = values if operands.values is None else operands.values.float() + values.float()
    elif isinstance(term, Table):
        if operands.table is not None and operands.table.shape[-1] != term.table.shape[-1]:
            raise UnsupportedError(
                f"a sum of relative position biases of {operands.table.shape[-1]} and {term.table.shape[-1]} entries",
                "tables of one size",
                "repeat the first and the last entry of the shorter one until they are as long",
            )
        operands.table = term.table if operands.table is None else operands.table + term.table
    else:
        raise UnsupportedError(
            f"a term of type {type(term).__name__} from a bias",
            "Rank, Linear, Tile or Table of flashbias.terms",
            "write the bias as a sum of those, or pass its matrix as DenseBias",
        )


def _storage(tensor: Tensor, exact: bool = False) -> Tensor:
    """The tensor in a dtype that the kernels read; `exact`: perhaps float64."""
    read = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) or (exact and tensor.dtype == torch.float64)
    return tensor if read else tensor.float()


def _times(factor: Tensor, unit: float) -> Tensor:
    return factor if unit == 1.0 else factor.float() * unit


def _columns(first: Tensor, second: Tensor) -> Tensor:
    """Two factors side by side."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    shape = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    return torch.cat([factor.to(dtype).expand(*shape, factor.shape[-1]) for factor in (first, second)], -1)
