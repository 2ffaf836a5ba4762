"""Factors of squared distances that kernels make, where nothing has a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from cases import BROADCASTS, Case, build
from torch import Tensor

from flashbias import (
    ALiBi,
    DenseBias,
    FactoredBias,
    KeyPadding,
    Segments,
    SpatialDistance,
    biased_attention,
    reference,
)
from flashbias.kernels import columns, points, replay
from flashbias.terms import Problem, Rank
from flashbias.testing import assert_as_accurate, eager


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The factors that kernels have made; of calls that are made from notes, none."""
    found: list[tuple[Tensor, Tensor]] = []
    ours = points.distance_factors

    def noted(*arguments: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        found.append(ours(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(points, "distance_factors", noted)
    return found


def by_torch(bias: SpatialDistance, problem: Problem) -> Rank:
    with torch.enable_grad():
        x_q, x_k, weight = (x.detach().clone().requires_grad_() for x in (bias.x_q, bias.x_k, bias.weight))
        (term,) = SpatialDistance(x_q, x_q if bias.x_k is bias.x_q else x_k, weight).terms(problem)
    return term


@torch.no_grad()
def check(bias: SpatialDistance, query: Tensor, n_k: int, kv_heads: int | None = None, **options: Any) -> None:
    """Factors lie as torch's do, and attention is as accurate as the contract says, twice: once made from notes."""
    heads, n_q = query.shape[-3:-1]
    exact = query.dtype == torch.float32
    problem = Problem(tuple(query.shape[:-3]), heads, n_q, n_k, n_k - n_q, query.device, exact=exact)
    (ours,), torchs = bias.terms(problem), by_torch(bias, problem)
    for side in ("q_factor", "k_factor"):
        mine, other = getattr(ours, side), getattr(torchs, side)
        assert mine.shape == other.shape
        assert mine.is_contiguous()
        assert mine.dtype == other.dtype == (torch.float64 if exact else torch.float32)
    shape = (*query.shape[:-3], kv_heads or heads, n_k, 16)
    key, value = (torch.randn(shape, device=query.device).to(query.dtype) for _ in range(2))
    truth, measure = (f(query, key, value, bias, **options) for f in (reference, eager))
    for _ in range(2):
        for result, other, oracle in zip(
            biased_attention(query, key, value, bias, return_lse=True, **options), measure, truth, strict=True
        ):
            assert_as_accurate("result", result, other, oracle, query.dtype)


def queries(n: int, device: str, heads: int = 2, batch: tuple[int, ...] = (2,), dtype: Any = torch.float32) -> Tensor:
    return torch.randn(*batch, heads, n, 16).to(device).to(dtype)


FAR = [
    (torch.float32, 0.0), (torch.float32, 1e3), (torch.float64, 0.0), (torch.float64, 1e4), (torch.bfloat16, 0.0),
    (torch.float16, 10.0),
]  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("dtype", "far"), FAR, ids=str)
def test_coordinates_of_any_dtype_wherever_they_lie(
    dtype: torch.dtype, far: float, half: bool, made: list[Any], device: str
) -> None:
    query = queries(9, device, dtype=torch.float16 if half else torch.float32)
    x_q, x_k = (far + 2 * torch.rand(2, n, 3, dtype=torch.float64).to(device, dtype) for n in (9, 17))
    check(SpatialDistance(x_q, x_k, torch.randn(2, 2, 9).to(device)), query, 17)
    assert len(made) == 2  # one of them for the call


@pytest.mark.parametrize("broadcast", BROADCASTS)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (2, 1, 3)], ids=str)
def test_every_pattern_of_broadcasting(broadcast: str, batch: tuple[int, ...], made: list[Any], device: str) -> None:
    case = Case("distance", batch=batch, broadcast=broadcast, n_q=9, n_k=17, heads=2)
    inputs = build(case, device)
    with torch.no_grad():
        check(inputs.make_bias(inputs.leaves), inputs.leaves["query"], 17)
    assert len(made) == 2


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "weights": lambda x: x,
    "one weight a batch row": lambda x: x[:, :1, :1],
    "one weight": lambda x: x[0, 0, 0],
    "weights of no head": lambda x: x[0, 0],
    "weights in double": lambda x: x.double(),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("left", "right"), [((2, 1), (1, 3)), ((), (2, 3)), ((2, 3), (3,)), ((1, 1), (1, 1))], ids=str)
def test_points_and_weights_that_broadcast_against_each_other(
    weight: str, left: tuple[int, ...], right: tuple[int, ...], made: list[Any], device: str
) -> None:
    x_q, x_k = torch.randn(*left, 9, 2).to(device), torch.randn(*right, 17, 2).to(device)
    bias = SpatialDistance(x_q, x_k, WEIGHTS[weight](torch.randn(3, 2, 9).to(device)))
    check(bias, queries(9, device, batch=(2, 3)), 17)
    assert len(made) == 2


def _apart(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "apart": _apart,
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "expanded": lambda x: x[:1].expand_as(x),
    "a part of features": lambda x: torch.cat((x, x + torch.nan), -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, made: list[Any], device: str) -> None:
    x_q, x_k, weight = (LAYOUTS[layout](torch.randn(2, 3, n, 2).to(device)) for n in (9, 17, 9))
    weight = LAYOUTS[layout](torch.randn(2, 3, 2, 9).to(device).flatten(0, 1)).unflatten(0, (2, 3))
    check(SpatialDistance(x_q, x_k, weight), queries(9, device, batch=(2, 3)), 17)
    assert len(made) == 2


@pytest.mark.parametrize("d", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(("n_q", "n_k"), [(9, 17), (40, 1), (1, 40), (1, 1), (70, 33)])
def test_dimensions_and_lengths(d: int, n_q: int, n_k: int, made: list[Any], device: str) -> None:
    x_q, x_k = (5 + torch.randn(2, n, d).to(device) / d**0.5 for n in (n_q, n_k))
    check(SpatialDistance(x_q, x_k, torch.randn(2, 2, n_q).to(device)), queries(n_q, device), n_k)
    assert len(made) == 2


@pytest.mark.parametrize("n", [1, 33])
def test_points_that_attend_to_themselves(n: int, made: list[Any], device: str) -> None:
    x, weight = torch.rand(2, n, 3).to(device) + 100, torch.randn(2, 4, n).to(device)
    for other in (x, x.view_as(x), x.clone()):
        check(SpatialDistance(x, other, weight), queries(n, device, 4), n, kv_heads=2, is_causal=True)
    assert all(torch.equal(q, made[0][0]) and torch.equal(k, made[0][1]) for q, k in made)


@pytest.mark.parametrize("d", [3, 300])
def test_several_blocks_and_shares(d: int, device: str) -> None:
    """The outermost point in any of them, of either side, is found."""
    rows = points.ENTRIES // triton.next_power_of_2(d + 2)
    n_q, n_k = 3 * rows + 5, 1 + points.SHARES * rows
    x_q, x_k = torch.rand(1, n_q, d).to(device), torch.rand(1, n_k, d).to(device)
    weight = torch.ones(n_q, device=device)
    for x, place in ((x_q, 0), (x_q, n_q - 1), (x_k, n_k - 1), (x_k, n_k // 2)):
        x[0, place] = 9 + torch.rand(d).to(device)
        q_factor, k_factor = points.distance_factors(x_q, x_k, weight)
        middle = (torch.cat((x_q, x_k), 1).amax(1) + torch.cat((x_q, x_k), 1).amin(1)) / 2
        for factor, points_, scale in ((q_factor, x_q, -1), (k_factor, x_k, -2)):
            torch.testing.assert_close(factor[:, 0, :, :d], scale * (points_ - middle[:, None]), rtol=0, atol=1e-5)
        x[0, place] = 0.5


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["x_q", "x_k"])
def test_coordinates_that_are_not_finite(strange: float, side: str, device: str) -> None:
    """Others of theirs are relative to zero, and all else is as it was."""
    x = {"x_q": torch.rand(2, 9, 3).to(device) + 3, "x_k": torch.rand(2, 17, 3).to(device) + 3}
    x[side][0, 4, 1] = strange
    bias = SpatialDistance(x["x_q"], x["x_k"], torch.rand(2, 9).to(device))
    for exact in (False, True):
        problem = Problem((2,), 2, 9, 17, 8, x["x_q"].device, exact=exact)
        torchs = by_torch(bias, problem)
        ours = points.distance_factors(bias.x_q, bias.x_k, bias.weight, exact=exact)
        for mine, other in zip(ours, (torchs.q_factor, torchs.k_factor), strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-5, atol=1e-5)


UNIT = 0.3
SCALES = [(1.0, 1.0), (1e-4, 1.0), (1e3, 1.0), (1.0, 1e-6), (1.0, 1e4), (0.0, 1.0), (1.0, 0.0)]


@pytest.mark.parametrize(("far", "heavy"), SCALES)
@pytest.mark.parametrize("d", [1, 3, 14, 50])
def test_columns_are_factors_over_a_unit(far: float, heavy: float, d: int, device: str) -> None:
    """In halves that fp16 holds, as good as 22 bits of the largest product."""
    x_q, x_k = (7 + far * torch.randn(2, n, d).to(device) / d**0.5 for n in (70, 33))
    weight = heavy * torch.randn(2, 4, 70).to(device)
    q, k = points.distance_factors(x_q, x_k, weight, UNIT)
    assert q.dtype == k.dtype == torch.float16
    assert q.shape == (2, 4, 70, columns.padded(3 * (d + 2)))
    assert k.shape == (2, 1, 33, q.shape[-1])
    assert not q[..., 3 * (d + 2) :].any()
    assert not k[..., 3 * (d + 2) :].any()
    q_factor, k_factor = points.distance_factors(x_q, x_k, weight, exact=True)
    ours, truth = UNIT * q.double() @ k.double().mT, q_factor @ k_factor.mT
    products = (q_factor.abs() @ k_factor.abs().mT).amax()
    assert (ours - truth).abs().max() <= 2**-20 * max(products.item(), 2**-8)  # halves of less are too small for fp16


@pytest.mark.parametrize(("left", "right"), [((2, 1), (1, 3)), ((), (2, 3)), ((1, 1), (1, 1))], ids=str)
def test_columns_of_points_and_weights_that_broadcast(
    left: tuple[int, ...], right: tuple[int, ...], device: str
) -> None:
    x_q, x_k = torch.randn(*left, 9, 2).to(device), torch.randn(*right, 17, 2).to(device)
    bias = SpatialDistance(x_q, x_k, torch.randn(2, 1, 2, 1).to(device))
    check(bias, queries(9, device, batch=(2, 3), dtype=torch.float16), 17)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_columns_beside_coordinates_that_are_not_finite(strange: float, device: str) -> None:
    x_q, x_k = torch.rand(2, 9, 3).to(device) + 3, torch.rand(2, 17, 3).to(device) + 3
    weight = torch.rand(2, 1, 9).to(device)
    x_k[0, 4, 1], x_q[1, 2, 0], weight[0, 0, 7] = strange, strange, strange
    q, k = points.distance_factors(x_q, x_k, weight, UNIT)
    truth = SpatialDistance(x_q, x_k, weight).dense(9, 17, dtype=torch.float64)
    finite = truth.isfinite()
    ours = UNIT * q.double() @ k.double().mT
    assert ours.isfinite().equal(finite)
    torch.testing.assert_close(ours[finite], truth[finite], rtol=0, atol=1e-4)


@torch.no_grad()
def test_beside_half_precision_a_call_has_three_launches(device: str) -> None:
    query, x, weight = queries(9, device, dtype=torch.float16), torch.rand(2, 9, 3).to(device), torch.rand(9).to(device)
    biased_attention(query, query, query, SpatialDistance(x, x, weight))
    (made,) = replay._passes.values()
    assert made is not None
    assert [is_kept for _, is_kept in made.steps].count(False) == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_beside_ids_masks_and_values_of_few_bits(dtype: torch.dtype, device: str) -> None:
    """Of which triton 3.6 makes no weights for products of float64."""
    query, x = queries(9, device), 30 * torch.rand(2, 9, 3).to(device)
    ids, allowed = (torch.arange(9, device=device) % 2).to(dtype), torch.rand(2, 2, 9, 9).to(device) < 0.9
    leaves = {"x": x, "weight": torch.rand(2, 9).to(device), "values": torch.randn(9, 9).to(device).half()}

    def gradients(attend: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        x, weight, values = own = [leaf.to(dtype or leaf.dtype).requires_grad_() for leaf in leaves.values()]
        q = query.to(dtype or query.dtype)
        out = attend(q, q, q, SpatialDistance(x, x, weight) + DenseBias(values), mask=Segments(ids, ids) & allowed)
        return torch.autograd.grad((out if isinstance(out, Tensor) else out[0]).square().sum(), own)

    made, measure, truth = gradients(biased_attention), gradients(eager), gradients(reference, torch.float64)
    for name, result, other, oracle in zip(leaves, made, measure, truth, strict=True):
        assert result.dtype == leaves[name].dtype
        assert_as_accurate(name, result, other, oracle, result.dtype)


def test_torch_makes_them_where_it_is_needed(made: list[Any], monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    query, x = queries(9, device), torch.rand(2, 9, 3).to(device)
    weight = torch.rand(2, 9).to(device)

    def attend(bias: Any, **options: Any) -> None:
        with torch.no_grad():
            biased_attention(query, query, query, bias, **options)

    attend(SpatialDistance(x, x, weight), mask=KeyPadding(torch.tensor([3, 9], device=device)))
    biased_attention(query, query, query, SpatialDistance(x, x, weight.clone().requires_grad_()))
    with torch.autograd.profiler.profile():
        attend(SpatialDistance(x, x, weight))
    with torch.autograd.forward_ad.dual_level():
        attend(SpatialDistance(x, x, weight))
    torch.vmap(lambda x: SpatialDistance(x, x, weight).terms(Problem((), 2, 9, 9, 0, x.device))[0].q_factor)(x)
    nothing = x[:, :0]
    with torch.no_grad():
        biased_attention(query, query[..., :0, :], query[..., :0, :], SpatialDistance(x, nothing, weight))
    if device == "cpu":
        monkeypatch.setenv("FLASHBIAS_BACKEND", "cpu")
        attend(SpatialDistance(x, x, weight))
    assert made == []


@torch.no_grad()
def test_the_first_call_gives_what_later_ones_do(device: str) -> None:
    """By kernels in a pass of their own, or in the call's: the same bits, in a sum and with other gradients too."""
    query, x, weight = queries(9, device), torch.rand(2, 9, 3).to(device), torch.rand(2, 9).to(device)
    bias = SpatialDistance(x, x, weight)
    for whole in (bias, bias + ALiBi(torch.rand(2).to(device)), bias + FactoredBias(query, query)):
        first, *later = (biased_attention(query, query, query, whole) for _ in range(3))
        with torch.enable_grad():
            later += [biased_attention(query.clone().requires_grad_(), query, query, whole) for _ in range(2)]
        for out in later:
            assert torch.equal(out, first)
