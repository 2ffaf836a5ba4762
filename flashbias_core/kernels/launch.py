"""From operands to launches: the order of the kernels, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from ctypes import c_float
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashbias import plan
from flashbias.operands import TOTALS, Operands
from flashbias.output import abreast, new_output
from flashbias.tiles import Tiles

from .backward import PITCH, Far, Forward, Low, delta_kernel
from .bias_gradients import table_gradient, values_gradient
from .call import Call, prepare
from .columns import GradientColumns, gradient_columns, gradient_width
from .expansion import FACTORS, expanded, factor_gradients
from .forward import combine_kernel, forward_kernel
from .keys import keys_kernel
from .layout import reduce_to
from .queries import queries_kernel
from .replay import contiguous, done, known_pass, reduced, repeated, room, room_by
from .terms import Block

DELTA_ENTRIES = 2048  # of the output
WIDE = 128  # features
NUMBERS = ("symmetric", "causal", "offset", "factor_unit")  # of the operands, the last ones
FEW_COLUMNS = 4
NARROW = {"values": (torch.float16, torch.bfloat16), "allowed": (torch.bool,)} | dict.fromkeys(
    ("q_ids", "k_ids"), (torch.int8, torch.int16)
)
QUERY_SIDE = {"query", "q_factor", *TOTALS}  # whose gradients the queries' kernel makes


def again(
    known: Sequence[Hashable], tensors: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]
) -> Sequence[Tensor]:
    """What `make()` gives, which comes of a call of these tensors, the first of them query, and all else of it."""
    return repeated(_of_call(known, tensors), tensors, make)


def known_way(known: Sequence[Hashable], tensors: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Any] | None:
    """How a call of these tensors that `again` has made is made; None where it is made anew each time."""
    return known_pass(_of_call(known, tensors), tensors)


def _of_call(known: Sequence[Hashable], tensors: Sequence[Tensor]) -> Hashable:
    return ("call", *known, *[tensor.device for tensor in tensors])  # make() refuses other devices


def forward(
    query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float,
    wanted: Callable[[], set[str]] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `(*batch, H, Nq, Cv)` and LSE `(*batch, H, Nq)`; arguments as `ops.attention` has them.

    `wanted()` names the inputs whose gradients will be asked for, so that what makes them is compiled along with this.
    """
    tensors, others = _parted(operands)
    out, lse = repeated(
        ("forward", scale, *others),
        (query, key, value, *tensors),
        lambda: _forward(query, key, value, operands, scale),
        wanted and (lambda out, lse, names=wanted: _backward(
            out.new_empty_strided(out.shape, out.stride()), None, out, lse, query, key, value, operands, scale, names()
        )),
    )  # fmt: skip
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
    """Gradients of the inputs in `names`, in their shapes. What is shared or broadcast is summed in a fixed order."""
    tensors, others = _parted(operands)
    order = sorted(names)

    def make() -> list[Tensor]:
        made = _backward(grad_out, grad_lse, out, lse, query, key, value, operands, scale, names)
        return [made[name] for name in order]

    inputs = (query, key, value, grad_out, grad_lse, out, lse, *tensors)
    made = repeated(("backward", scale, *others, *order), inputs, make)
    return dict(zip(order, made, strict=True))


def _parted(operands: Operands) -> tuple[list[Tensor | None], list[Any]]:
    """What is a tensor, or None where one might be, and the rest."""
    values = operands.in_order()
    return values[: -len(NUMBERS)], values[-len(NUMBERS) :]


def _forward(query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float) -> tuple[Tensor, Tensor]:
    out = room_by(new_output, query, value.shape[-1])
    lse = room(query, query.shape[:-1], torch.float32)
    if out.numel() == 0 or key.shape[-2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    exactly = _in_doubles(query, key)
    operands = expanded(query, key.shape[-2], operands) or _held(operands, exactly, query)
    call = prepare(query, key, value, operands, scale)
    teams = call.teams("forward", query)
    if teams:
        from . import hopper  # not everywhere can its language be imported

        hopper.forward(call, teams, out, lse, abreast(query))
        return out, lse
    tiles = call.tiles("double forward" if exactly else "forward", query)
    programs = _programs(query, tiles)
    splits = plan.key_splits(programs, key.shape[-2], query.device)
    parts = out, lse
    if splits > 1:
        lse_dtype = torch.float64 if exactly else torch.float32
        parts = room(query, (splits, *out.shape), torch.float32), room(lse, (splits, *lse.shape), lse_dtype)
    call.launch(
        forward_kernel, (programs, splits), tiles, out=parts[0], lse=parts[1], n_splits=splits,
        unit_rest=_unit_rest(scale) if exactly else None,
        ABREAST=abreast(query), LONG=call.frame.traits["LONG"], IN_PARTS=splits > 1,
    )  # fmt: skip
    if splits > 1:
        call.launch(
            combine_kernel, (lse.numel(), 1), out_parts=parts[0], lse_parts=parts[1], out=out, lse=lse,
            n_splits=splits, n_q=query.shape[-2], n_heads=query.shape[-3], C_V=value.shape[-1],
            WIDTH_V=call.frame.constants["WIDTH_V"], ABREAST=abreast(query),
            BLOCK=plan.power_of_2(splits),
        )  # fmt: skip
    return out, lse


def _has_few(query: Tensor, key: Tensor) -> bool:
    return plan.is_few(query.shape[:-1].numel() * key.shape[-2])


def _in_doubles(query: Tensor, key: Tensor) -> bool:
    """Whether all of a call comes from scores in float64: of few in fp32."""
    return query.dtype == torch.float32 and _has_few(query, key) and plan.has_doubles(query.device)


def _held(operands: Operands, exactly: bool, query: Tensor) -> Operands:
    """Operands whose factors are in float64 only where all comes `exactly`, of products."""
    if not operands.in_doubles:
        return operands
    held = replace(operands)
    if exactly and not plan.sums_doubles(query.dtype, query.device):
        # Of what is less than 32 bits wide triton 3.6 cannot make weights for products of float64.
        for name, narrow in NARROW.items():
            tensor = getattr(operands, name)
            if tensor is not None and tensor.dtype in narrow:
                setattr(held, name, done(Tensor.float if tensor.is_floating_point() else Tensor.int, tensor))
    else:
        for name in FACTORS:
            setattr(held, name, done(Tensor.float, getattr(operands, name)))
    return held


def _unit_rest(scale: float) -> float:
    """What fp32, in which kernels are given a number, leaves of the unit."""
    return scale - c_float(scale).value


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    operands: Operands, scale: float, names: set[str],
) -> dict[str, Tensor]:  # fmt: skip
    d_lse = None if grad_lse is None else contiguous(grad_lse)
    given = Forward(_as_made(out, query), lse, d_lse, abreast(query))
    multiplied = expanded(query, key.shape[-2], operands)
    if multiplied is None:
        return _gradients(grad_out, given, query, key, value, operands, scale, names)
    factors = names & set(FACTORS)
    wanted = names - factors | ({"values"} if factors else set())
    made = _gradients(grad_out, given, query, key, value, multiplied, scale, wanted, torch.float32)
    return made | (factor_gradients(made.pop("values"), operands, factors) if factors else {})


def _gradients(
    grad_out: Tensor, given: Forward, query: Tensor, key: Tensor, value: Tensor, operands: Operands, scale: float,
    names: set[str], values_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What `backward` gives; the gradient of values in another dtype than theirs where one is named."""
    inputs = {"query": query, "key": key, "value": value, **vars(operands)}
    if given.out.numel() == 0 or key.numel() == 0:
        return {name: torch.zeros_like(inputs[name]) for name in names}
    exact = query.dtype == torch.float32
    exactly = _in_doubles(query, key)
    operands = _held(operands, exactly, query)
    # Wider ones spill registers, of which the forward pass needs fewer.
    exactly = exactly and (operands.in_doubles or max(query.shape[-1], value.shape[-1]) <= WIDE)
    call = prepare(query, key, value, operands, scale, values_gradient="values" in names)
    rows = query.shape[:-2].numel(), plan.cdiv(query.shape[-2], PITCH.value) * PITCH.value
    level, delta = (room(query, rows, torch.float32) for _ in range(2))
    low = Low(*(room(query, rows, torch.float32, zeros=True) for _ in range(2))) if exact else None
    statistics = {"d_out": call.frame.layout.block(grad_out), "level": level, "delta": delta, "low": low}
    doubles = names if exactly else names & TOTALS if exact and plan.has_doubles(query.device) else set()
    gradients: dict[str, Tensor | None] = {}
    # Each by itself: statistics are those of the scores that a pass has, so that their errors cancel.
    for some, rest in ((names - doubles, None), (doubles, _unit_rest(scale))):
        if some:
            gradients |= _pass(given, query, key, value, operands, some, values_dtype, call, statistics, rest)
    gradients |= {name: _sum_groups(gradients[name], inputs[name]) for name in names & {"key", "value"}}
    if operands.factor_unit != 1.0:
        gradients |= {name: reduced(torch.mul, gradients[name], operands.factor_unit) for name in names & set(FACTORS)}
    return {name: reduce_to(gradients[name], inputs[name].shape) for name in names}


def _pass(
    given: Forward, query: Tensor, key: Tensor, value: Tensor, operands: Operands, names: set[str],
    values_dtype: torch.dtype | None, call: Call, statistics: dict[str, Any], unit_rest: float | None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Gradients of `names`, for each query head; from scores in float64 with what fp32 leaves of the unit."""
    better = statistics["low"] is not None or bool(names & TOTALS)
    # Where few columns make up a bias, what rows of dS lack of a sum of zero weighs most in their gradient.
    better |= bool(names & {"q_factor", "k_factor"}) and _is_split(operands.q_factor, query)
    # Over so many features the rounding of outputs adds up to more in delta than a gradient of single scores may lose.
    better |= "values" in names and value.shape[-1] > WIDE
    few = _has_few(query, key) and names != {"value"}  # for which delta does not count
    gradients: dict[str, Tensor | None] = {}
    # First the queries' side, which improves the statistics for the others where their gradients need it.
    if better or few or names & QUERY_SIDE:
        gradients |= _query_side(query, operands.k_factor, given, names, call, statistics, better, few, unit_rest)
    else:
        _make_statistics(query, given, call, statistics)
    if names & {"key", "value", "k_factor"}:
        gradients |= _key_side(query, key, value, operands.q_factor, names, call, statistics, unit_rest)
    if "values" in names and operands.values is not None:
        dtype = values_dtype or operands.values.dtype
        gradients["values"] = values_gradient(query, key.shape[-2], operands.values, dtype, call, statistics, unit_rest)
    if "table" in names and operands.table is not None:
        far = gradients["before"], gradients["behind"]
        gradients["table"] = table_gradient(query, key.shape[-2], operands, far, call, statistics, unit_rest)
    return {name: gradients[name] for name in names}


def _as_made(out: Tensor, query: Tensor) -> Tensor:
    """The output as it lies where it is made; copied where it has come back in another way."""
    if abreast(query):
        return contiguous(out.transpose(-3, -2)).transpose(-3, -2)
    return contiguous(out)


def _make_statistics(query: Tensor, given: Forward, call: Call, statistics: dict[str, Any]) -> None:
    """Level and delta of all rows, which the kernels that make gradients read."""
    rows, pitch = statistics["level"].shape
    width = call.frame.constants["WIDTH_V"]
    tile = min(DELTA_ENTRIES // width, 32)
    call.launch(
        delta_kernel, (pitch // tile * rows, 1), d_out=statistics["d_out"], d_lse=given.d_lse,
        out=call.frame.layout.block(given.out), lse=given.lse, delta=statistics["delta"], level=statistics["level"],
        n_q=query.shape[-2], n_inner=call.frame.layout.inner, n_heads=query.shape[-3], unit=call.frame.sizes["unit"],
        C_V=given.out.shape[-1], WIDTH_V=width, BLOCK_M=tile,
    )  # fmt: skip


def _query_side(
    query: Tensor, k_factor: Tensor | None, given: Forward, names: set[str], call: Call,
    statistics: dict[str, Any], better: bool, few: bool, unit_rest: float | None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Statistics, gradients of queries, of their factor and of slopes; `better` than the dtype of the queries is.

    For `few` scores in half precision a launch of its own betters the statistics first, since the gradient of queries
    feels it too: rows of rounded outputs that attend to one key have a delta that is off by as much as dP.
    With `unit_rest`, what fp32 leaves of the unit, from scores in float64.
    """
    factor = k_factor if "q_factor" in names else None
    teams = _teams("queries" if factor is None else "q_factor", query, factor, call, statistics)
    if teams:
        by_teams = _queries_by_teams(query, factor, given, names, call, statistics, better, teams)
        if by_teams:
            return by_teams
    _make_statistics(query, given, call, statistics)
    double = unit_rest is not None
    tiles = call.tiles("double queries" if double else "queries", query)
    side = _columns(factor, query, tiles)
    d_query = room(query, query.shape) if "query" in names else None
    d_slopes = _per_row(query, double) if "slopes" in names else None
    d_far = Far(_per_row(query, double), _per_row(query, double)) if "table" in names else Far(None, None)
    made: dict[str, Any] = {"d_query": d_query, "d_slopes": d_slopes, "d_far": d_far if "table" in names else None}
    common = {"d_lse": given.d_lse, "unit_rest": unit_rest, "SPLIT": _is_split(factor, query), **statistics}
    slices = _slices(side)
    if few and statistics["low"] is None:
        small = call.tiles("statistics", query)
        call.launch(
            queries_kernel, (_programs(query, small), 1), small, **dict.fromkeys(made), EXCESS=True, d_columns=None,
            gradient_columns=None, GRADIENT_RANK=0, **common,
        )  # fmt: skip
        slices = slices if names & QUERY_SIDE else []
    parts: list[Tensor] = []
    for start, stop in slices:
        part = None if side is None else side.room(query, (*query.shape[:-1], stop - start))
        call.launch(
            queries_kernel, (_programs(query, tiles), 1), tiles, **made, EXCESS=better, d_columns=part,
            gradient_columns=_block(side, start, stop, call), GRADIENT_RANK=stop - start, **common,
        )  # fmt: skip
        made = dict.fromkeys(made)
        parts += [] if part is None else [part]
    slopes, before, behind = (None if rows is None else reduced(_row_sums, rows) for rows in (d_slopes, *d_far))
    return {
        "query": d_query,
        "slopes": slopes,
        "before": before,
        "behind": behind,
        "q_factor": None if side is None else side.combine(_joined(parts)),
    }


def _programs(query: Tensor, tiles: Tiles) -> int:
    """One for each tile of queries."""
    return plan.cdiv(query.shape[-2], tiles.block_m) * query.shape[:-2].numel()


def _key_side(
    query: Tensor, key: Tensor, value: Tensor, q_factor: Tensor | None, names: set[str], call: Call,
    statistics: dict[str, Any], unit_rest: float | None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Gradients of keys and values for each query head, and of their factor; `unit_rest`: as above."""
    factor = q_factor if "k_factor" in names else None
    teams = _teams("keys" if factor is None else "k_factor", query, factor, call, statistics)
    if teams:
        by_teams = _keys_by_teams(query, key, value, factor, call, statistics, teams)
        if by_teams:
            return by_teams
    tiles = call.tiles("keys" if unit_rest is None else "double keys", query)
    side = _columns(factor, query, tiles)
    d_key = _per_head(query, key) if "key" in names else None
    d_value = _per_head(query, value) if "value" in names else None
    made: dict[str, Tensor | None] = {"d_key": d_key, "d_value": d_value}
    parts: list[Tensor] = []
    for start, stop in _slices(side):
        part = None if side is None else side.room(query, (*query.shape[:-2], key.shape[-2], stop - start))
        call.launch(
            keys_kernel, (plan.cdiv(key.shape[-2], tiles.block_n) * query.shape[:-2].numel(), 1), tiles, **made,
            d_columns=part, unit_rest=unit_rest,
            gradient_columns=_block(side, start, stop, call), GRADIENT_RANK=stop - start,
            SPLIT=_is_split(factor, query), **statistics,
        )  # fmt: skip
        made = dict.fromkeys(made)
        parts += [] if part is None else [part]
    return {"key": d_key, "value": d_value, "k_factor": None if side is None else side.combine(_joined(parts))}


def _teams(kind: str, query: Tensor, factor: Tensor | None, call: Call, statistics: dict[str, Any]) -> Tiles | None:
    """The tiles with which teams make gradients; of a factor those of one slice of columns."""
    tiles = call.teams(kind, query)
    columns = 0 if factor is None else gradient_width(factor, query.dtype)
    if tiles is None or len(plan.slices(columns)) > 1:
        return None
    return None if call.lie(statistics["d_out"]) is None else tiles


def _queries_by_teams(
    query: Tensor, k_factor: Tensor | None, given: Forward, names: set[str], call: Call,
    statistics: dict[str, Any], better: bool, tiles: Tiles,
) -> dict[str, Tensor | None]:  # fmt: skip
    """What `_query_side` gives, by teams of warps; empty where they do not serve."""
    from . import hopper_queries

    side = _columns(k_factor, query, tiles)
    d_query = room(query, query.shape)
    d_slopes = _per_row(query) if "slopes" in names else None
    columns, block = _room_for_columns(query, query.shape[-2], side, call)
    split = _is_split(k_factor, query)
    if not hopper_queries.backward(call, tiles, statistics, given, d_query, d_slopes, columns, block, split, better):
        return {}
    slopes = None if d_slopes is None else reduced(_row_sums, d_slopes)
    q_factor = None if side is None or columns is None else side.combine(columns)
    return {"query": d_query, "slopes": slopes, "q_factor": q_factor}


def _keys_by_teams(
    query: Tensor, key: Tensor, value: Tensor, q_factor: Tensor | None, call: Call, statistics: dict[str, Any],
    tiles: Tiles,
) -> dict[str, Tensor | None]:  # fmt: skip
    """What `_key_side` gives, by teams of warps; empty where they do not serve."""
    from . import hopper_keys

    side = _columns(q_factor, query, tiles)
    d_key, d_value = _per_head(query, key), _per_head(query, value)
    columns, block = _room_for_columns(query, key.shape[-2], side, call)
    split = _is_split(q_factor, query)
    if not hopper_keys.backward(call, tiles, statistics, d_key, d_value, columns, block, split):
        return {}
    k_factor = None if side is None or columns is None else side.combine(columns)
    return {"key": d_key, "value": d_value, "k_factor": k_factor}


def _room_for_columns(
    query: Tensor, rows: int, side: GradientColumns | None, call: Call
) -> tuple[Tensor | None, Block | None]:
    """Room for the gradients of all of a factor's columns, and what is multiplied to make them."""
    if side is None:
        return None, None
    number = side.columns.shape[-1]
    return side.room(query, (*query.shape[:-2], rows, number)), _block(side, 0, number, call)


def _columns(factor: Tensor | None, query: Tensor, tiles: Tiles) -> GradientColumns | None:
    return None if factor is None else gradient_columns(factor, query.dtype, tiles.columns)


def _slices(side: GradientColumns | None) -> list[tuple[int, int]]:
    """A kernel takes as many columns at a time, and runs again for the next."""
    return plan.slices(0 if side is None else side.columns.shape[-1])


def _block(side: GradientColumns | None, start: int, stop: int, call: Call) -> Block | None:
    if side is None:
        return None
    number = side.columns.shape[-1]
    columns = side.columns if stop - start == number else done(Tensor.narrow, side.columns, -1, start, stop - start)
    return call.frame.layout.block(columns)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else reduced(_side_by_side, *parts)


def _side_by_side(*parts: Tensor) -> Tensor:
    return torch.cat(parts, -1)


def _is_split(factor: Tensor | None, query: Tensor) -> bool:
    """Whether dS is taken in two halves: an eager computation has it in fp32, and few columns average no rounding."""
    if factor is None or query.dtype == torch.float32:
        return False
    return factor.dtype != query.dtype or factor.shape[-1] <= FEW_COLUMNS


def _per_row(query: Tensor, double: bool = False) -> Tensor:
    """Room for sums over the keys of each query, `(*batch, H, Nq)`."""
    return room(query, query.shape[:-1], torch.float64 if double else torch.float32)


def _per_head(query: Tensor, tensor: Tensor) -> Tensor:
    """Room for the gradient of keys or values for each query head; in fp32 where a group's are to be summed."""
    dtype = tensor.dtype if query.shape[-3] == tensor.shape[-3] else torch.float32
    return room(tensor, (*query.shape[:-2], *tensor.shape[-2:]), dtype)


def _sum_groups(gradient: Tensor | None, tensor: Tensor) -> Tensor | None:
    if gradient is None or gradient.shape == tensor.shape:
        return gradient
    return reduced(_group_sums, gradient, tensor.shape[-3])


def _group_sums(gradient: Tensor, heads: int) -> Tensor:
    return gradient.unflatten(-3, (heads, -1)).sum(-3)


def _row_sums(rows: Tensor) -> Tensor:
    return rows.sum(-1, dtype=torch.float64)
