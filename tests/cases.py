"""Problems for the operator, by name, and the check that every backend has to pass.

A `Case` names a bias, a mask, a dtype and sizes. `check` runs it through `biased_attention`, forward and backward, and
compares output, LSE and every gradient with the float64 oracle, by the error of an eager computation.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flashbias import (
    ALiBi,
    Bias,
    Causal,
    DenseBias,
    FactoredBias,
    KeyPadding,
    Mask,
    RelativePositionBias,
    Segments,
    SpatialDistance,
    biased_attention,
    reference,
)
from flashbias.masks import Allowed
from flashbias.testing import assert_as_accurate, eager

# Single biases and masks; join biases with "+" and masks with "&".
BIASES = (
    "none", "factored", "factored_fp32", "alibi", "alibi_symmetric", "alibi_positions", "alibi_float", "distance",
    "dense", "dense_row", "dense_inf", "table", "table_long", "table_single",
)  # fmt: skip
MASKS = (
    "none", "causal", "causal_offset", "causal_early", "causal_tensor", "lengths", "segments", "allowed", "allowed_row",
)  # fmt: skip
SUMS = (
    "factored+alibi", "distance+dense_row", "factored+alibi_symmetric+dense", "factored+distance", "dense+dense",
    "table+table", "factored+alibi+table+dense",
)  # fmt: skip
JOINS = ("causal&lengths", "causal_tensor&segments", "segments&lengths&allowed", "causal&causal_tensor")
# Which dimensions of biases and masks are those of the call; the others have size 1 or are missing.
BROADCASTS = ("full", "batch", "first", "last", "heads", "missing", "bare")
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")


@dataclass(frozen=True)
class Case:
    """One call of the operator.

    bias, mask: names from `BIASES` and `MASKS`, joined with "+" and "&".
    dtype: of query, key, value, factors and values; positions, coordinates, weights and slopes are fp32.
    batch, heads, kv_heads, n_q, n_k, c, c_v, rank: sizes; kv_heads and c_v are heads and c where None.
    broadcast: how batch and head dimensions of biases and masks broadcast, from `BROADCASTS`.
    layout: strides of query, key and value, from `LAYOUTS`; "expanded" gives key and value batch dimensions of 1.
    cotangents: "both", "out" or "lse", the outputs that have a gradient.
    poison: plant NaN in all that belongs to keys beyond the lengths of a `lengths` mask.
    """

    bias: str = "none"
    mask: str = "none"
    dtype: torch.dtype = torch.float32
    batch: tuple[int, ...] = (2,)
    heads: int = 2
    kv_heads: int | None = None
    n_q: int = 33
    n_k: int = 33
    c: int = 16
    c_v: int | None = None
    rank: int = 8
    broadcast: str = "full"
    layout: str = "contiguous"
    cotangents: str = "both"
    poison: bool = True
    scale: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        batch = "x".join(map(str, (*self.batch, self.heads)))
        heads = f"/{self.kv_heads}" if self.kv_heads else ""
        dims = f"{self.c}:{self.c_v}" if self.c_v else f"{self.c}"
        name = str(self.dtype).removeprefix("torch.")
        parts = (self.bias, self.mask, name, f"{batch}{heads}", f"{self.n_q}x{self.n_k}", dims, f"r{self.rank}")
        return "-".join((*parts, self.broadcast, self.layout, self.cotangents))


@dataclass
class Inputs:
    """What a case is made of. `leaves` have gradients; `make_bias` makes the bias from leaves of any dtype."""

    leaves: dict[str, Tensor]
    make_bias: Callable[[dict[str, Tensor]], Bias | None]
    mask: Mask | None
    lengths: Tensor | None = None
    cotangents: dict[str, Tensor] = field(default_factory=dict)


def pairwise(*axes: Sequence[dict[str, Any]], base: Case | None = None) -> list[Case]:
    """Cases in which every value of each axis meets every value of every other axis.

    An axis is a sequence of changes to `base`, such as `[{"bias": "alibi"}, {"bias": "dense", "rank": 4}]`.
    """
    base = base or Case()
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(axes)), 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    cases: list[Case] = []
    while missing:
        chosen = dict(min(missing))
        for axis in range(len(axes)):
            if axis not in chosen:
                turns = [(i + len(cases)) % len(axes[axis]) for i in range(len(axes[axis]))]
                others = list(chosen.items())
                gains = [sum(tuple(sorted(((axis, i), other))) in missing for other in others) for i in turns]
                chosen[axis] = turns[gains.index(max(gains))]
        missing -= set(itertools.combinations(sorted(chosen.items()), 2))
        changes: dict[str, Any] = {}
        for axis, i in sorted(chosen.items()):
            changes.update(axes[axis][i])
        cases.append(replace(base, **changes, seed=len(cases)))
    return cases


def drawn(seed: int, dtypes: Sequence[torch.dtype], lengths: Sequence[int]) -> Case:
    """A case of which everything is drawn at random; but for the dtype the same among two dtypes as among three."""
    draw = random.Random(seed)
    heads = draw.choice((1, 2, 3, 4))
    return Case(
        bias=draw.choice((*BIASES, *SUMS)),
        mask=draw.choice((*MASKS, *JOINS)),
        dtype=dtypes[draw.randrange(6) % len(dtypes)],
        batch=draw.choice(((), (1,), (2,), (1, 2))),
        heads=heads,
        kv_heads=draw.choice([None, *(own for own in range(1, heads) if heads % own == 0)]),
        n_q=draw.choice(lengths),
        n_k=draw.choice(lengths),
        c=draw.choice((1, 3, 16, 24, 32, 40, 64, 72, 80)),
        c_v=draw.choice((None, 8, 33, 64)),
        rank=draw.choice((1, 3, 8, 12, 17, 33, 64, 96)),
        broadcast=draw.choice(BROADCASTS),
        layout=draw.choice(LAYOUTS),
        cotangents=draw.choice(("both", "out", "lse")),
        scale=draw.choice((None, 0.2, 1.0, -0.3)),
        seed=seed,
    )


def build(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Random inputs of a case, the same ones on every device."""
    draw = _Draw(case, device)
    kv_heads, c_v = case.kv_heads or case.heads, case.c_v or case.c
    kv_batch = (1,) * len(case.batch) if case.layout == "expanded" else case.batch
    leaves = {
        "query": draw.normal(*case.batch, case.heads, case.n_q, case.c),
        "key": draw.normal(*kv_batch, kv_heads, case.n_k, case.c),
        "value": draw.normal(*kv_batch, kv_heads, case.n_k, c_v),
    }
    makers = []
    for i, name in enumerate(part for part in case.bias.split("+") if part != "none"):
        own, make = _bias(name, draw)
        leaves.update({f"{leaf}{i or ''}": tensor for leaf, tensor in own.items()})
        makers.append((i, list(own), make))

    def make_bias(leaves: dict[str, Tensor]) -> Bias | None:
        total: Bias | None = None
        for i, names, make in makers:
            bias = make(*(leaves[f"{name}{i or ''}"] for name in names))
            total = bias if total is None else total + bias
        return total

    mask: Mask | None = None
    lengths = None
    for name in case.mask.split("&"):
        if name != "none":
            part = _mask(name, draw)
            lengths = part.lengths if isinstance(part, KeyPadding) else lengths
            mask = part if mask is None else mask & part
    cotangents = {
        "out": draw.normal(*case.batch, case.heads, case.n_q, c_v),
        "lse": draw.normal(*case.batch, case.heads, case.n_q, dtype=torch.float32),
    }
    wanted = ("out", "lse") if case.cotangents == "both" else (case.cotangents,)
    return Inputs(leaves, make_bias, mask, lengths, {name: cotangents[name] for name in wanted})


def check(case: Case, device: torch.device | str = "cpu") -> None:
    """Assert that output, LSE and every gradient of a case are as accurate as the contract says."""
    inputs = build(case, device)
    ours = dict(inputs.leaves)
    if case.poison and inputs.lengths is not None:
        ours = {name: _poison(name, leaf, inputs.lengths, case) for name, leaf in ours.items()}

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, **options: Any) -> Any:
        query, key, value = (arrange(tensor, case.layout) for tensor in (query, key, value))
        return biased_attention(query, key, value, bias, return_lse=True, **options)

    result = run(attend, case, inputs, ours)
    measure = run(eager, case, inputs, inputs.leaves)
    truth = run(reference, case, inputs, {name: leaf.double() for name, leaf in inputs.leaves.items()})
    assert result["out"].dtype == case.dtype
    assert result["lse"].dtype == torch.float32
    for name, oracle in truth.items():
        assert_as_accurate(f"{name} of {case}", result[name], measure[name], oracle, case.dtype)
    dead = truth["lse"] == -torch.inf
    for name in ("out", "gradient of query"):
        assert (result[name][dead] == 0).all(), f"{name} of {case}: not zero where a query attends nowhere"


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The same values `(*batch, H, N, C)` with other strides."""
    if layout == "transposed":
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "strided":
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]
    return tensor


def run(function: Callable[..., Any], case: Case, inputs: Inputs, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    bias = inputs.make_bias(leaves)
    out, lse = function(leaves["query"], leaves["key"], leaves["value"], bias, mask=inputs.mask, scale=case.scale)
    outputs = {"out": out, "lse": lse}
    targets = [outputs[name] for name in inputs.cotangents]
    cotangents = [
        cotangent.to(target.dtype) for target, cotangent in zip(targets, inputs.cotangents.values(), strict=True)
    ]
    gradients = torch.autograd.grad(targets, list(leaves.values()), cotangents, materialize_grads=True)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


class _Draw:
    """Random tensors of a case; those of biases and masks get the batch and head dimensions of its broadcast."""

    def __init__(self, case: Case, device: torch.device | str) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.case.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    @property
    def batch(self) -> tuple[int, ...]:
        sizes, broadcast = self.case.batch, self.case.broadcast
        if broadcast in ("missing", "bare"):
            return ()
        keep = {"full": sizes, "heads": sizes, "first": sizes[:1], "last": (), "batch": ()}[broadcast]
        tail = sizes[-1:] if broadcast == "last" else ()
        return (*keep, *(1 for _ in sizes[len(keep) + len(tail) :]), *tail)

    @property
    def heads(self) -> tuple[int, ...]:
        return {"heads": (1,), "bare": ()}.get(self.case.broadcast, (self.case.heads,))


def _bias(name: str, draw: _Draw) -> tuple[dict[str, Tensor], Callable[..., Bias]]:
    """Leaves of a bias, and what makes it of them."""
    case, batch, heads = draw.case, draw.batch, draw.heads
    n_q, n_k = case.n_q, case.n_k
    if name in ("factored", "factored_fp32"):
        dtype = torch.float32 if name == "factored_fp32" else case.dtype
        size = case.rank**-0.25 * 1.5**0.5
        factors = {
            "q_factor": (draw.normal(*batch, *heads, n_q, case.rank, dtype=torch.float32) * size).to(dtype),
            "k_factor": (draw.normal(*batch, *heads, n_k, case.rank, dtype=torch.float32) * size).to(dtype),
        }
        return factors, FactoredBias
    if name.startswith("alibi"):
        options: dict[str, Any] = {"symmetric": name == "alibi_symmetric"}
        if name == "alibi_positions":  # a text with holes, from which the queries are a sample
            k_positions = draw.integers(0, 3, *batch, n_k).cumsum(-1)
            options |= {"k_positions": k_positions, "q_positions": draw.integers(0, max(n_k, 1), *batch, n_q)}
        elif name == "alibi_float":
            options |= {"q_positions": draw.uniform(n_q) * 40, "k_positions": draw.uniform(*batch, n_k) * 40}
        slopes = 2.0 ** -(1 + 6 * draw.uniform(*batch, *(heads or (1,))))
        return {"slopes": slopes}, lambda slopes: ALiBi(slopes, **options)
    if name.startswith("distance"):  # "distance_wide": points 50 times as far apart as those that interact
        dim, side = (1, 50) if name == "distance_wide" else (3, 2)
        leaves = {
            "x_q": 10 + side * draw.uniform(*batch, n_q, dim),
            "x_k": 10 + side * draw.uniform(*batch, n_k, dim),
            "weight": draw.normal(*batch, *heads, n_q, dtype=torch.float32),
        }
        return leaves, SpatialDistance
    if name.startswith("table"):
        distances = {"table": 2 * 7 - 1, "table_long": 2 * (n_q + n_k) + 1, "table_single": 1}[name]
        table = draw.normal(*batch, *heads, distances, dtype=torch.float32) * 2
        return {"table": table}, RelativePositionBias
    rows = 1 if name == "dense_row" else n_q
    values = draw.normal(*batch, *heads, rows, n_k) * 2
    if name == "dense_inf":
        values = values.masked_fill(draw.uniform(*values.shape) < 0.3, -torch.inf)
    elif name == "dense_ends":  # by turns queries attend to nothing, to the last tile of 64, to those before, to all
        last = torch.arange(n_k, device=values.device) >= (n_k - 1) // 64 * 64
        seen = torch.stack((last & ~last, last, ~last, last | ~last))[torch.arange(rows, device=values.device) % 4]
        values = values.masked_fill(~seen, -torch.inf)
    elif name not in ("dense", "dense_row"):
        raise ValueError(f"no bias is named {name}")
    return {"values": values}, DenseBias


def _mask(name: str, draw: _Draw) -> Mask:
    case, batch, heads = draw.case, draw.batch, draw.heads
    n_q, n_k = case.n_q, case.n_k
    match name:
        case "causal":
            return Causal()
        case "causal_offset":  # room for keys that come later
            return Causal(max(n_k - n_q - 3, 0))
        case "causal_early":  # the first queries attend nowhere
            return Causal(-2)
        case "causal_tensor":
            return Causal(draw.integers(-2, n_k + 1, *batch))
        case "lengths":
            lengths = draw.integers(0, n_k + 1, *batch)
            return KeyPadding(lengths)
        case "segments":
            return Segments(draw.integers(-1, 3, *batch, n_q), draw.integers(-1, 3, *batch, n_k).int())
        case "allowed":
            return Allowed(draw.uniform(*batch, *heads, n_q, n_k) < 0.5)
        case "allowed_row":
            return Allowed(draw.uniform(*batch, *heads, 1, n_k) < 0.7)
    raise ValueError(f"no mask is named {name}")


def _poison(name: str, leaf: Tensor, lengths: Tensor, case: Case) -> Tensor:
    """The leaf with NaN wherever it belongs to keys that the lengths exclude for all who share the entry."""
    kinds = {"key": 3, "value": 3, "k_factor": 3, "x_k": 2, "values": 3}  # dimensions behind those of the batch
    own = kinds.get(name.rstrip("0123456789"))
    if own is None:
        return leaf
    batch = (1,) * len(case.batch) + tuple(leaf.shape[:-own])
    beyond = torch.arange(case.n_k, device=leaf.device) >= lengths[..., None]
    beyond = beyond.expand(*case.batch, case.n_k)
    for dim, size in enumerate(batch[len(batch) - len(case.batch) :]):
        if size == 1:
            beyond = beyond.all(dim, keepdim=True)
    beyond = beyond.view(*leaf.shape[:-own], *(1,) * (min(own, leaf.dim()) - 2), case.n_k)
    return leaf.masked_fill(beyond[..., None, :] if name.startswith("values") else beyond[..., None], torch.nan)


def ids(cases: Iterable[Case]) -> list[str]:
    """Names for `pytest.mark.parametrize`."""
    return [str(case) for case in cases]
