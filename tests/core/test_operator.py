"""The operator's interface: the paper's signature, sums, defaults, scales, far and long positions, biases of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
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
    Segments,
    SpatialDistance,
    biased_attention,
    flash_bias_func,
    reference,
)
from flashbias.masks import Allowed
from flashbias.terms import Linear, Problem, Rank, Term, Tile
from flashbias.testing import assert_as_accurate, eager

LONG = 131_072


@pytest.fixture(params=["cpu", "triton"])
def place(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the tensors for each backend."""
    monkeypatch.setenv("FLASHBIAS_BACKEND", request.param)
    return device if request.param == "triton" else "cpu"


def compare(function: Callable[..., Any], leaves: dict[str, Tensor], *, tolerance: float | None = None) -> None:
    """Assert that `function(attention, leaves)`, its gradients too, is as accurate as the contract says.

    `function` calls the attention that it is given, which returns output and LSE. A tolerance takes the place of the
    contract where gradients pass through somebody else's code.
    """
    dtype = leaves["query"].dtype

    def ours(*args: Any, **others: Any) -> Any:
        return biased_attention(*args, return_lse=True, **others)

    def run(attention: Callable[..., Any], *, wide: bool = False) -> list[Tensor]:
        own = {name: (leaf.double() if wide else leaf).detach().requires_grad_() for name, leaf in leaves.items()}
        out, lse = function(attention, own)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        d_lse = torch.linspace(1, -1, lse.numel(), device=lse.device).view(lse.shape).to(lse.dtype)
        gradients = torch.autograd.grad((out, lse), list(own.values()), (weights, d_lse), materialize_grads=True)
        return [out, lse, *gradients]

    results, oracles = run(ours), run(reference, wide=True)
    if tolerance is not None:
        for result, oracle in zip(results, oracles, strict=True):
            torch.testing.assert_close(result.double(), oracle, rtol=tolerance, atol=tolerance)
        return
    measures = run(eager)
    for i, name in enumerate(("out", "lse", *(f"gradient of {name}" for name in leaves))):
        assert_as_accurate(name, results[i], measures[i], oracles[i], dtype)


def qkv(n_q: int, n_k: int, place: str, *, dtype: torch.dtype = torch.float32, heads: int = 2) -> dict[str, Tensor]:
    shapes = {"query": (2, heads, n_q, 16), "key": (2, heads, n_k, 16), "value": (2, heads, n_k, 16)}
    return {name: torch.randn(shape, device=place).to(dtype) for name, shape in shapes.items()}


# The paper's signature.


def call_paper(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The oracle in the paper's layout: `(B, N, H, C)`, output and LSE."""
    q_bias, k_bias, mask, causal, scale = args
    bias: Bias | None = None
    if q_bias is not None:
        bias = FactoredBias(q_bias.transpose(1, 2), k_bias.transpose(1, 2))
    if mask is not None and mask.is_floating_point():
        bias, mask = DenseBias(mask) if bias is None else bias + DenseBias(mask), None
    out, lse = reference(*(x.transpose(1, 2) for x in (q, k, v)), bias, mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2), lse


# Half of all combinations: any two values of different axes meet.
PAPER = [
    (factors, kind, batch, heads)
    for i, factors in enumerate(("none", "full", "same", "q_only"))
    for j, kind in enumerate(("none", "float", "bool"))
    for k, (batch, heads) in enumerate([(1, 1), (3, 1), (1, 2), (3, 2)])
    if (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(("factors", "kind", "batch", "heads"), PAPER)
def test_flash_bias_func(factors: str, kind: str, batch: int, heads: int, place: str) -> None:
    """Factors and masks with batch or head dimensions of 1, also where the two factors differ, forward and backward."""
    n_q, n_k, rank = 5, 9, 4
    shapes = {"q": (3, n_q, 2, 16), "k": (3, n_k, 2, 16), "v": (3, n_k, 2, 8)}
    if factors != "none":
        own, full = (batch, heads), (3, 2)
        q_sizes, k_sizes = {"full": (full, full), "same": (own, own), "q_only": (own, full)}[factors]
        shapes["q_bias"] = (q_sizes[0], n_q, q_sizes[1], rank)
        shapes["k_bias"] = (k_sizes[0], n_k, k_sizes[1], rank)
    leaves = {name: torch.randn(shape, device=place) for name, shape in shapes.items()}
    rows = 1 if batch == heads else n_q
    boolean = None
    if kind == "float":
        leaves["mask"] = torch.randn(batch, heads, rows, n_k, device=place)
    elif kind == "bool":
        boolean = torch.rand(batch, heads, rows, n_k, device=place) < 0.6
    causal, scale = batch == 1, (None, 0.0, 0.7)[heads + (factors == "same") - 1]

    results = []
    for function, wide in ((flash_bias_func, False), (call_paper, True)):
        t = {name: (leaf.double() if wide else leaf).detach().requires_grad_() for name, leaf in leaves.items()}
        options = (t.get("q_bias"), t.get("k_bias"), t.get("mask", boolean), causal, scale)
        out = function(t["q"], t["k"], t["v"], *options)
        out = out[0] if wide else out
        assert out.shape == (3, n_q, 2, 8)
        gradients = torch.autograd.grad(out.square().sum(), list(t.values()))
        results.append((out, *gradients))
    for result, oracle in zip(*results, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), oracle, rtol=1e-4, atol=1e-4)


def test_flash_bias_func_takes_its_arguments_in_the_order_of_the_paper(place: str) -> None:
    q, k, v = (torch.randn(1, 6, 2, 16, device=place) for _ in range(3))
    q_bias, k_bias = (torch.randn(1, 6, 1, 3, device=place) for _ in range(2))
    mask = torch.randn(1, 1, 1, 6, device=place)
    result = flash_bias_func(q, k, v, q_bias, k_bias, mask, True, 0.3)
    wanted, _ = call_paper(q, k, v, q_bias, k_bias, mask, True, 0.3)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=1e-4)
    named = flash_bias_func(
        q, k, v, q_bias=q_bias, k_bias=k_bias, mask=mask, causal=True, softmax_scale=0.3
    )  # fmt: skip
    assert torch.equal(named, result)


def test_flash_bias_func_is_aligned_at_the_bottom_right(place: str) -> None:
    """The last query sees all keys: one query with a cache of keys attends to all of them."""
    q, k, v = (torch.randn(1, n, 1, 16, device=place) for n in (1, 7, 7))
    torch.testing.assert_close(flash_bias_func(q, k, v, causal=True), flash_bias_func(q, k, v))


# Sums and joins.


SUMS: dict[str, Callable[[dict[str, Tensor]], Bias]] = {
    "two_factored": lambda t: FactoredBias(t["a"], t["b"]) + FactoredBias(t["c"], t["d"]),
    "two_alibis": lambda t: ALiBi(t["slopes"]) + ALiBi(t["more"]),
    "two_dense": lambda t: DenseBias(t["values"]) + DenseBias(t["row"]),
    "all": lambda t: (
        FactoredBias(t["a"], t["b"]) + ALiBi(t["slopes"]) + DenseBias(t["values"])
        + SpatialDistance(t["x_q"], t["x_k"], t["weight"]) + DenseBias(t["row"]) + FactoredBias(t["c"], t["d"])
    ),
    "nested": lambda t: (
        (DenseBias(t["values"]) + ALiBi(t["slopes"])) + (FactoredBias(t["a"], t["b"]) + ALiBi(t["more"]))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str, place: str) -> None:
    n_q, n_k = 7, 9
    shapes = {
        "a": (2, 1, n_q, 3), "b": (n_k, 3), "c": (2, n_q, 5), "d": (2, 1, n_k, 5), "slopes": (2,), "more": (2, 1),
        "values": (2, n_q, n_k), "row": (2, 1, 1, n_k), "x_q": (n_q, 2), "x_k": (2, n_k, 2), "weight": (n_q,),
    }  # fmt: skip
    leaves = qkv(n_q, n_k, place) | {name: torch.randn(shape, device=place) for name, shape in shapes.items()}
    compare(lambda attend, t: attend(t["query"], t["key"], t["value"], SUMS[name](t), mask=Causal()), leaves)


def test_a_sum_is_its_parts() -> None:
    a, b, c = DenseBias(torch.randn(5, 6)), ALiBi(torch.rand(2)), FactoredBias(torch.randn(5, 2), torch.randn(6, 2))
    assert list(((a + b) + c).parts()) == [a, b, c] == list((a + (b + c)).parts())
    torch.testing.assert_close((a + b + c).dense(5, 6), a.dense(5, 6) + b.dense(5, 6) + c.dense(5, 6))


MASKS: dict[str, Callable[[str], Mask]] = {
    "causals": lambda place: Causal(3) & Causal() & Causal(1),
    "causal_tensors": lambda place: (
        Causal(torch.tensor([4, 0], device=place)) & Causal(2) & Causal(torch.tensor([1, 5], device=place))
    ),
    "lengths": lambda place: (
        KeyPadding(torch.tensor([4, 9], device=place)) & KeyPadding(torch.tensor([[6], [2]], device=place)[:, 0])
    ),
    "segments": lambda place: (
        Segments(torch.arange(7, device=place) // 3, torch.arange(9, device=place) // 3)
        & Segments(torch.arange(7, device=place) % 3 - 1, torch.arange(9, device=place) % 3 - 1)
    ),
    "booleans": lambda place: (
        Allowed(torch.arange(9, device=place)[None] != 4) & (torch.arange(63, device=place).view(7, 9) % 5 != 0)
    ),
    "all": lambda place: (
        Causal() & KeyPadding(torch.tensor([4, 9], device=place)) & (torch.arange(9, device=place) != 1)
        & Segments(torch.arange(7, device=place) // 4, torch.arange(9, device=place) // 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_joined_masks(name: str, place: str) -> None:
    """ALiBi goes with them: its default positions are those of the smallest causal offset."""
    leaves = qkv(7, 9, place) | {"slopes": torch.rand(2, device=place)}
    mask = MASKS[name](place)
    compare(lambda attend, t: attend(t["query"], t["key"], t["value"], ALiBi(t["slopes"]), mask=mask), leaves)


def test_is_causal_joins_the_mask(place: str) -> None:
    t = qkv(7, 9, place)
    lengths = KeyPadding(torch.tensor([4, 9], device=place))
    short = biased_attention(**t, mask=lengths, is_causal=True)
    assert torch.equal(short, biased_attention(**t, mask=lengths & Causal()))
    assert torch.equal(biased_attention(**t, is_causal=True), biased_attention(**t, mask=Causal(2)))


# What is returned.


def test_return_lse(place: str) -> None:
    t = qkv(7, 9, place, dtype=torch.float16)
    alone = biased_attention(**t)
    out, lse = biased_attention(**t, return_lse=True)
    assert torch.equal(alone, out)
    assert (out.dtype, out.shape) == (torch.float16, (2, 2, 7, 16))
    assert (lse.dtype, lse.shape) == (torch.float32, (2, 2, 7))


@pytest.mark.parametrize("n_q", [1, 5, 70])
def test_the_output_lies_as_the_queries_do(n_q: int, place: str) -> None:
    """So that hosts join heads without a copy; neither the result nor gradients depend on it."""
    t = qkv(n_q, 10, place)
    slopes, weight = torch.rand(2, device=place), torch.randn(1, 2, n_q, t["value"].shape[-1], device=place)
    results = []
    for abreast in (False, True):
        query = t["query"].transpose(1, 2).contiguous().transpose(1, 2) if abreast else t["query"]
        leaves = [x.detach().requires_grad_() for x in (query, t["key"], t["value"], slopes)]
        out, lse = biased_attention(*leaves[:3], ALiBi(leaves[3]), return_lse=True)
        assert lse.is_contiguous()
        assert out.transpose(1, 2).is_contiguous() == (abreast or n_q == 1)
        assert out.is_contiguous() == (not abreast or n_q == 1)
        (out * weight).sum().backward()
        results.append([out, lse, *(leaf.grad for leaf in leaves)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_lse_joins_two_halves_of_the_keys(place: str) -> None:
    """What an LSE is for: attention over parts of the keys, put together, is attention over all."""
    t = qkv(7, 10, place)
    slopes, positions = torch.rand(2, device=place), torch.arange(10, device=place)
    q_positions = torch.arange(7, device=place)
    parts = []
    for keys in (slice(0, 4), slice(4, 10), slice(0, 10)):
        bias = ALiBi(slopes, q_positions=q_positions, k_positions=positions[keys])
        parts.append(biased_attention(t["query"], t["key"][:, :, keys], t["value"][:, :, keys], bias, return_lse=True))
    (left, lse_left), (right, lse_right), (whole, lse) = parts
    torch.testing.assert_close(torch.logaddexp(lse_left, lse_right), lse)
    weight = torch.sigmoid(lse_left - lse_right)[..., None]
    torch.testing.assert_close(weight * left + (1 - weight) * right, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0, 0.0, -0.0, -0.5, -2, 3])
def test_any_scale(scale: float, place: str) -> None:
    leaves = qkv(7, 9, place) | {"values": torch.randn(2, 7, 9, device=place)}
    compare(lambda attend, t: attend(t["query"], t["key"], t["value"], DenseBias(t["values"]), scale=scale), leaves)


@pytest.mark.parametrize("bias", ["none", "distance", "alibi"])
def test_numbers_of_numpy(bias: str, place: str) -> None:
    """A scale and a flag may be those, which are not quite Python's."""
    t = [torch.randn(2, 3, 9, 16, device=place).half() for _ in range(3)]
    x, slopes, weight = (torch.rand(shape, device=place) for shape in ((9, 3), (3,), (3, 9)))

    def attend(scale: Any, symmetric: Any) -> Any:
        biases = {"distance": SpatialDistance(x, x, weight), "alibi": ALiBi(slopes, symmetric=symmetric)}
        return biased_attention(*t, biases.get(bias), scale=scale)

    with torch.no_grad():
        assert torch.equal(attend(np.float64(0.3), np.bool_(True)), attend(0.3, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_rows_and_keys_padded_with_the_least_number(scale: float, dtype: torch.dtype, place: str) -> None:
    """As hosts do: padding on the left, which fills the first tiles, and rows that nobody reads."""
    query, key, value = (torch.randn(1, 2, 150, 16, device=place).to(dtype).requires_grad_() for _ in range(3))
    values = torch.zeros(150, 150, device=place)
    values[:, :100] = torch.finfo(torch.float32).min
    values[140:] = torch.finfo(torch.float32).min
    out = biased_attention(query, key, value, DenseBias(values), scale=scale)
    own = (x[..., 100:, :] for x in (key, value))
    wanted = biased_attention(query, *own, scale=scale)
    torch.testing.assert_close(out[..., :140, :], wanted[..., :140, :], rtol=2e-3, atol=1e-3)
    out[..., :140, :].float().square().sum().backward()
    for x in (query, key, value):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_factors_beyond_half_precision(place: str) -> None:
    """A column that pads keys, beside queries of 16 bits."""
    query, key, value = (torch.randn(1, 2, 20, 16, device=place).half() for _ in range(3))
    column = torch.zeros(20, 1, device=place)
    for least in (-1e9, -1e20, -1e30):
        column[15:] = least
        out = biased_attention(query, key, value, FactoredBias(torch.ones_like(column), column))
        torch.testing.assert_close(out, biased_attention(query, key[..., :15, :], value[..., :15, :]))


FARTHEST = [2**31 - 1, 2**40, 2**63 - 1]


@pytest.mark.parametrize("far", FARTHEST)
def test_offsets_and_lengths_beyond_32_bits(far: int, place: str) -> None:
    query, key, value = (torch.randn(1, 2, 20, 16, device=place) for _ in range(3))
    whole = biased_attention(query, key, value)
    masks = [Causal(far), Causal(torch.tensor([far], device=place)), KeyPadding(torch.tensor([far], device=place))]
    for mask in masks:
        torch.testing.assert_close(biased_attention(query, key, value, mask=mask), whole)
    for nothing in (Causal(-far), Causal(torch.tensor([-far], device=place))):
        assert not biased_attention(query, key, value, mask=nothing).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_points_that_are_padding_stand_anywhere(dtype: torch.dtype, place: str) -> None:
    """Queries too, which lengths do not name."""
    leaves = {name: torch.randn(1, 2, 30, 16, device=place).to(dtype) for name in ("query", "key", "value")}
    leaves["x"] = torch.rand(30, 3, device=place) * 2 + 1000
    leaves["x"][20:] = 0
    leaves["weight"] = torch.rand(2, 30, device=place)

    def attend(attention: Callable[..., Any], t: dict[str, Tensor]) -> Any:
        mask = KeyPadding(torch.tensor([20], device=place))
        bias = SpatialDistance(t["x"], t["x"], t["weight"])
        return tuple(made[:, :, :20] for made in attention(t["query"], t["key"], t["value"], bias, mask=mask))

    compare(attend, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_beyond_the_lengths_is_read(dtype: torch.dtype, place: str) -> None:
    """Not where there are no keys at all, nor where the bias itself is given gradients, which have places there."""
    query, key, value = (torch.randn(3, 2, 37, 16, device=place).to(dtype) for _ in range(3))
    lengths = torch.tensor([0, 20, 37], device=place)
    values = torch.randn(3, 2, 37, 37, device=place)
    results = []
    for filler in (0.0, torch.nan):
        beyond = (torch.arange(37, device=place) >= lengths[:, None])[:, None, :, None]
        leaves = [query.clone(), key.masked_fill(beyond, filler), value.masked_fill(beyond, filler), values.clone()]
        *rows, matrix = (leaf.requires_grad_() for leaf in leaves)
        out, lse = biased_attention(*rows, DenseBias(matrix), mask=KeyPadding(lengths), return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for result, first in zip(*results, strict=True):
        assert torch.equal(result, first)
        assert not first.isnan().any()


def test_small_integers(place: str) -> None:
    query, key, value = (torch.randn(1, 2, 20, 16, device=place) for _ in range(3))
    ids = torch.arange(20, device=place, dtype=torch.uint8) // 10 + 254
    bytes_, whole = (biased_attention(query, key, value, mask=Segments(x, x)) for x in (ids, ids.int()))
    assert torch.equal(bytes_, whole)
    offset = torch.tensor([3], device=place, dtype=torch.int8)
    joined = Causal(offset) & Causal(300)
    assert torch.equal(
        biased_attention(query, key, value, mask=joined), biased_attention(query, key, value, mask=Causal(3))
    )


def test_a_list_of_biases_is_summed() -> None:
    slopes = ALiBi(torch.ones(2)), ALiBi(torch.full((2,), 0.5))
    torch.testing.assert_close(sum(slopes).dense(5, 7), 1.5 * slopes[0].dense(5, 7))


def test_scale_0_is_not_the_default(place: str) -> None:
    t = qkv(7, 9, place)
    out = biased_attention(**t, scale=0)
    torch.testing.assert_close(out, t["value"].mean(-2, keepdim=True).expand_as(out))
    out = flash_bias_func(*(t[name].transpose(1, 2) for name in ("query", "key", "value")), softmax_scale=0)
    torch.testing.assert_close(out, t["value"].mean(-2)[:, None].expand_as(out))


# Positions.


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("offset", [None, 0, 2, 5, "tensor"])
def test_default_positions_are_those_of_the_causal_mask(offset: Any, symmetric: bool, place: str) -> None:
    n_q, n_k = 5, 9
    if offset == "tensor":
        offset = torch.tensor([[1], [6]], device=place)
    mask = None if offset is None else Causal(offset.squeeze(-1) if isinstance(offset, Tensor) else offset)
    positions = torch.arange(n_q, device=place) + (n_k - n_q if offset is None else offset)
    t = qkv(n_q, n_k, place)
    slopes = torch.rand(2, device=place)
    explicit = ALiBi(slopes, symmetric=symmetric, q_positions=positions, k_positions=torch.arange(n_k, device=place))
    default = ALiBi(slopes, symmetric=symmetric)
    results = [biased_attention(**t, bias=bias, mask=mask, return_lse=True) for bias in (default, explicit)]
    for result, wanted in zip(*results, strict=True):
        torch.testing.assert_close(result, wanted)
    truth = reference(*t.values(), default, mask=mask)
    for result, wanted in zip(results[0], truth, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=1e-4)


def test_decoding_one_query_at_a_time_gives_the_same_as_all_at_once(place: str) -> None:
    t, n = qkv(6, 6, place), 6
    bias = ALiBi(torch.rand(2, device=place))
    whole = biased_attention(**t, bias=bias, is_causal=True)
    for i in range(n):
        query = t["query"][:, :, i : i + 1]
        cached = biased_attention(query, t["key"][:, :, : i + 1], t["value"][:, :, : i + 1], bias, is_causal=True)
        torch.testing.assert_close(cached, whole[:, :, i : i + 1], rtol=1e-4, atol=1e-5)
        # A cache with spare capacity, in which this query stands at position i.
        spare = biased_attention(query, t["key"], t["value"], bias, mask=Causal(i))
        torch.testing.assert_close(spare, whole[:, :, i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "cpu")


SAMPLED = torch.tensor([0, 1, 100, 65_535, LONG - 2, LONG - 1])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["causal", "symmetric", "mesh", "line"])
def test_accuracy_at_131072_positions(kind: str, dtype: torch.dtype) -> None:
    """Sampled rows of a long text, a long line, a large mesh; the oracle has no other rows."""
    leaves = {
        name: torch.randn(1, 1, n, 16).to(dtype)
        for name, n in (("query", len(SAMPLED)), ("key", LONG), ("value", LONG))
    }
    positions = torch.arange(LONG)
    if kind == "mesh":  # a mesh of a car: a few lengths across
        x = torch.rand(LONG, 3) * torch.tensor([4.0, 2.0, 1.5]) + torch.tensor([12.0, 0.0, 3.0])
        leaves |= {"x_q": x[SAMPLED], "x_k": x, "weight": torch.randn(1, len(SAMPLED))}
    elif kind == "line":  # points as far apart as positions of a text
        x = torch.linspace(-1, 1, LONG)[:, None]
        leaves |= {"x_q": x[SAMPLED], "x_k": x, "weight": torch.full((1, len(SAMPLED)), 20.0)}
    else:
        leaves["slopes"] = torch.tensor([0.5])

    def attend(attention: Any, t: dict[str, Tensor]) -> Any:
        if "x_q" in t:
            return attention(t["query"], t["key"], t["value"], SpatialDistance(t["x_q"], t["x_k"], t["weight"]))
        bias = ALiBi(t["slopes"], symmetric=kind == "symmetric", q_positions=SAMPLED, k_positions=positions)
        mask = None if kind == "symmetric" else (positions <= SAMPLED[:, None])
        return attention(t["query"], t["key"], t["value"], bias, mask=mask)

    compare(attend, leaves)


@pytest.mark.parametrize("far", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_box_far_from_the_origin(dtype: torch.dtype, far: float, place: str) -> None:
    """A box of side 2: logits and gradients as good at 1000 as at the origin. The oracle sees the same fp32 points."""
    leaves = qkv(9, 17, place, dtype=dtype)
    leaves |= {"x_q": 2 * torch.rand(9, 3, device=place) + far, "x_k": 2 * torch.rand(2, 17, 3, device=place) + far}
    leaves["weight"] = torch.randn(2, 9, device=place)
    compare(
        lambda attend, t: attend(t["query"], t["key"], t["value"], SpatialDistance(t["x_q"], t["x_k"], t["weight"])),
        leaves,
    )


def test_points_in_double_are_centred_in_double(place: str) -> None:
    """At a million, fp32 would lose the third decimal of the coordinates."""
    x_q, x_k = (2 * torch.rand(n, 3, device=place, dtype=torch.float64) for n in (9, 17))
    weight = torch.randn(9, device=place)
    t = qkv(9, 17, place)
    here = biased_attention(**t, bias=SpatialDistance(x_q, x_k, weight))
    there = biased_attention(**t, bias=SpatialDistance(x_q + 1e6, x_k + 1e6, weight))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [None, "queries", "keys"])
def test_points_that_attend_to_themselves(mask: str | None, place: str) -> None:
    """The same tensor on both sides: looked at once, but where a mask counts them differently; all of its gradient."""
    n, strange = 17, 7
    leaves = qkv(n, n, place)
    leaves |= {"x": torch.rand(2, n, 3, device=place) + 100, "weight": torch.randn(2, n, device=place)}
    leaves["x"][:, strange] += 3
    ids = {side: torch.zeros(n, dtype=torch.int32, device=place) for side in ("queries", "keys")}
    if mask:
        ids[mask][strange] = -1

    def attend(attention: Any, t: dict[str, Tensor]) -> Any:
        bias = SpatialDistance(t["x"], t["x"], t["weight"])
        return attention(t["query"], t["key"], t["value"], bias, mask=Segments(ids["queries"], ids["keys"]))

    compare(attend, leaves)


# Biases of somebody else.


class Table(Bias):
    """A learned value for each relative position, as a matrix: a Tile."""

    def __init__(self, table: Tensor) -> None:
        self.table = table  # (H, 2 N - 1)

    def dense(self, n_q: int, n_k: int, *, offset: Any = None, dtype: torch.dtype = torch.float32) -> Tensor:
        middle = self.table.shape[-1] // 2
        device = self.table.device
        index = torch.arange(n_k, device=device) - torch.arange(n_q, device=device)[:, None] + middle
        return self.table.to(dtype)[..., index]

    def terms(self, problem: Problem) -> Iterable[Term]:
        return [Tile(self.dense(problem.n_q, problem.n_k))]


class Periodic(Bias):
    """`a_h cos(w (i - j))` from products of sines and cosines: a Rank."""

    def __init__(self, amplitude: Tensor, frequency: Tensor) -> None:
        self.amplitude, self.frequency = amplitude, frequency  # (H,), ()

    def dense(self, n_q: int, n_k: int, *, offset: Any = None, dtype: torch.dtype = torch.float32) -> Tensor:
        device = self.amplitude.device
        distance = torch.arange(n_q, device=device)[:, None] - torch.arange(n_k, device=device)
        return self.amplitude.to(dtype)[:, None, None] * torch.cos(self.frequency.to(dtype) * distance)

    def terms(self, problem: Problem) -> Iterable[Term]:
        sides = []
        for n in (problem.n_q, problem.n_k):
            angle = self.frequency * torch.arange(n, device=problem.device)
            sides.append(torch.stack((angle.cos(), angle.sin()), -1))
        return [Rank(self.amplitude[:, None, None] * sides[0], sides[1][None])]


class Everything(Bias):
    """All kinds of terms at once, from other biases."""

    def __init__(self, slopes: Tensor, table: Tensor, amplitude: Tensor, frequency: Tensor) -> None:
        self.slopes, self.others = slopes, Table(table) + Periodic(amplitude, frequency)

    def dense(self, n_q: int, n_k: int, *, offset: Any = None, dtype: torch.dtype = torch.float32) -> Tensor:
        rest = self.others.dense(n_q, n_k, offset=offset, dtype=dtype)
        return rest + ALiBi(self.slopes).dense(n_q, n_k, offset=offset, dtype=dtype)

    def terms(self, problem: Problem) -> Iterable[Term]:
        yield Linear(self.slopes, None, None, False)
        yield from self.others.terms(problem)


THIRD_PARTY: dict[str, Callable[[dict[str, Tensor]], Bias]] = {
    "tile": lambda t: Table(t["table"]),
    "rank": lambda t: Periodic(t["amplitude"], t["frequency"]),
    "everything": lambda t: Everything(t["slopes"], t["table"], t["amplitude"], t["frequency"]),
    "in_a_sum": lambda t: Table(t["table"]) + ALiBi(t["slopes"]) + Periodic(t["amplitude"], t["frequency"]),
}


@pytest.mark.parametrize("name", THIRD_PARTY)
@pytest.mark.parametrize("offset", [None, 1])
def test_biases_defined_elsewhere(name: str, offset: int | None, place: str) -> None:
    shapes = {"table": (2, 31), "amplitude": (2,), "frequency": (), "slopes": (2,)}
    leaves = qkv(7, 9, place) | {name: torch.randn(shape, device=place) for name, shape in shapes.items()}
    mask = None if offset is None else Causal(offset)
    compare(
        lambda attend, t: attend(t["query"], t["key"], t["value"], THIRD_PARTY[name](t), mask=mask),
        leaves,
        tolerance=1e-4,
    )


def test_a_bias_learns_which_positions_count(place: str) -> None:
    seen = []

    class Spy(Table):
        def terms(self, problem: Problem) -> Iterable[Term]:
            seen.append(problem)
            return super().terms(problem)

    t = qkv(7, 9, place)
    lengths, q_ids = torch.tensor([4, 9], device=place), torch.arange(7, device=place) - 1
    mask = KeyPadding(lengths) & Segments(q_ids, torch.arange(9, device=place)) & Causal(3)
    biased_attention(**t, bias=Spy(torch.randn(2, 31, device=place)), mask=mask)
    (problem,) = seen
    assert (problem.batch, problem.heads, problem.n_q, problem.n_k, problem.offset) == ((2,), 2, 7, 9, 3)
    assert torch.equal(problem.q_counts, q_ids != -1)
    assert torch.equal(problem.k_counts, torch.arange(9, device=place) < lengths[:, None])


def test_parts_without_keys_can_be_merged(place: str) -> None:
    """`logaddexp` of two LSE of -inf has NaN for derivatives; they must not reach keys that nobody attended to."""
    leaves = {name: leaf.requires_grad_() for name, leaf in qkv(5, 6, place).items()}
    nobody = torch.zeros(5, 6, dtype=torch.bool, device=place)
    nobody[2:] = True
    parts = [
        biased_attention(leaves["query"], leaves["key"], leaves["value"], mask=nobody, return_lse=True)[1]
        for _ in range(2)
    ]
    total = torch.logaddexp(*parts)
    assert (total[..., :2] == -torch.inf).all()
    gradients = torch.autograd.grad(
        torch.where(total > -torch.inf, total, 0.0).sum(), list(leaves.values()), allow_unused=True
    )
    for gradient in gradients[:2]:
        assert gradient.isfinite().all()
        assert (gradient != 0).any()
