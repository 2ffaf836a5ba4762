"""What is special about a bias by relative position; accuracy in general is that of every bias (`cases.py`)."""

from __future__ import annotations

import pytest
import torch
from cases import Case, check, ids
from torch import Tensor

from flashbias import Causal, RelativePositionBias, biased_attention, plan
from flashbias.diagonals import fold, spread, sum_diagonals
from flashbias.tiles import parse


@pytest.fixture(params=["cpu", "triton"])
def place(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the tensors for each backend."""
    monkeypatch.setenv("FLASHBIAS_BACKEND", request.param)
    return device if request.param == "triton" else "cpu"


def test_entries_by_clamped_distance() -> None:
    table = torch.tensor([-20.0, -10.0, 0.0, 10.0, 20.0])
    matrix = RelativePositionBias(table).dense(4, 5, offset=1)
    wanted = [[-10, 0, 10, 20, 20], [-20, -10, 0, 10, 20], [-20, -20, -10, 0, 10], [-20, -20, -20, -10, 0]]
    assert matrix.tolist() == wanted
    assert torch.equal(RelativePositionBias(table).dense(4, 5), matrix)  # the last query stands at the last key
    offsets = torch.tensor([1, -3])
    per_batch = RelativePositionBias(torch.stack((table, 2 * table))).dense(4, 5, offset=offsets)
    assert per_batch.shape == (2, 2, 4, 5)
    assert torch.equal(per_batch[0, 1], 2 * matrix)
    assert torch.equal(per_batch[1, 0], RelativePositionBias(table).dense(4, 5, offset=-3))


@pytest.mark.parametrize(
    ("rows", "columns", "reach", "first"), [(4, 7, 3, -5), (1, 1, 0, 3), (5, 2, 20, -2), (3, 3, 1, 9)]
)
def test_sums_along_diagonals_are_the_gradient_of_a_spread_table(
    rows: int, columns: int, reach: int, first: int
) -> None:
    table = torch.randn(2, 2 * reach + 1, dtype=torch.float64, requires_grad=True)
    matrix = spread(table, torch.tensor(first), rows, columns)
    assert matrix.shape == (2, rows, columns)
    assert torch.equal(matrix[:, -1, 0], table[:, min(max(first, -reach), reach) + reach])
    cotangent = torch.randn_like(matrix)
    (wanted,) = torch.autograd.grad(matrix, table, cotangent)
    torch.testing.assert_close(fold(sum_diagonals(cotangent), first, 2 * reach + 1), wanted)


# Several bands of queries, most keys beyond the table's reach, few or all that share it.
LONG = [
    Case("table", "none", torch.float16, n_q=300, n_k=420, broadcast="full", batch=(1,), heads=1),
    Case("table", "causal", torch.float32, n_q=150, n_k=140, broadcast="batch", heads=1),
    Case("table", "causal_tensor", torch.float16, n_q=150, n_k=280, broadcast="missing", heads=1),
    Case("table_long", "lengths", torch.float16, n_q=150, n_k=140, broadcast="bare"),
    Case("table_single", "causal_early", torch.float16, n_q=150, n_k=70, broadcast="heads", heads=1),
]  # fmt: skip


@pytest.mark.parametrize("case", LONG, ids=ids(LONG))
def test_bands_of_long_rows(case: Case, place: str) -> None:
    check(case, place)


@pytest.mark.parametrize("tile", ["32x32/4/1", "64x16/4/1"])
def test_parts_of_the_gradient_do_not_change_it(tile: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Members split among programs, and columns taken a band at a time."""
    from flashbias.kernels import bias_gradients

    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    monkeypatch.setattr(plan, "tiles", lambda *args: parse(tile))
    monkeypatch.setattr(plan, "splits", lambda *args: 3)
    monkeypatch.setattr(bias_gradients, "BAND_BYTES", 1)
    check(Case("table", "causal_tensor", n_q=140, n_k=150, broadcast="missing", heads=1), device)
    check(Case("table_long", "lengths", torch.float16, n_q=140, n_k=150, broadcast="batch", heads=1), device)


def test_a_single_entry_is_no_bias(place: str) -> None:
    query, key, value = torch.randn(3, 1, 2, 20, 16, device=place).unbind()
    table = torch.full((2, 1), 3.0, device=place, requires_grad=True)
    out, lse = biased_attention(query, key, value, RelativePositionBias(table), return_lse=True)
    plain, plain_lse = biased_attention(query, key, value, return_lse=True)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse, plain_lse + 3)
    (gradient,) = torch.autograd.grad(lse.sum() + out.sum(), table)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 20.0))


def test_decoding_one_query_at_a_time_gives_the_same_as_all_at_once(place: str) -> None:
    """With a cache that grows, and with one that has room to spare, whose length is a tensor."""
    n = 9
    query, key, value = torch.randn(3, 2, 2, n, 16, device=place).unbind()
    bias = RelativePositionBias(torch.randn(2, 7, device=place))
    whole = biased_attention(query, key, value, bias, is_causal=True)
    for i in range(n):
        one = biased_attention(query[..., i : i + 1, :], key[..., : i + 1, :], value[..., : i + 1, :], bias)
        torch.testing.assert_close(one, whole[..., i : i + 1, :])
        mask = Causal(torch.tensor([i], device=place))
        spare = biased_attention(query[..., i : i + 1, :], key, value, bias, mask=mask)
        torch.testing.assert_close(spare, whole[..., i : i + 1, :])


def test_offsets_of_a_batch_are_those_of_its_elements(place: str) -> None:
    query, key, value = torch.randn(3, 3, 2, 11, 16, device=place).unbind()
    table = torch.randn(2, 9, device=place, requires_grad=True)

    def run(part: slice, offset: int | Tensor) -> tuple[Tensor, Tensor]:
        out = biased_attention(query[part], key[part], value[part], RelativePositionBias(table), mask=Causal(offset))
        return out, torch.autograd.grad(out.square().sum(), table)[0]

    out, gradient = run(slice(3), torch.tensor([4, 0, 7], device=place))
    parts = [run(slice(b, b + 1), offset) for b, offset in enumerate((4, 0, 7))]
    torch.testing.assert_close(out, torch.cat([part[0] for part in parts]))
    torch.testing.assert_close(gradient, torch.stack([part[1] for part in parts]).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_gradient_has_the_dtype_of_the_table(dtype: torch.dtype, place: str) -> None:
    query, key, value = torch.randn(3, 2, 8, 16, device=place).unbind()
    table = torch.randn(2, 5, device=place).to(dtype).requires_grad_()
    wide = table.detach().float().requires_grad_()
    gradients = [
        torch.autograd.grad(biased_attention(query, key, value, RelativePositionBias(t)).square().sum(), t)[0]
        for t in (table, wide)
    ]
    assert gradients[0].dtype == dtype
    assert torch.equal(gradients[0], gradients[1].to(dtype))


def test_repeats_bit_for_bit(place: str) -> None:
    query, key, value = torch.randn(3, 2, 1, 150, 16, device=place).unbind()
    table = torch.randn(1, 31, device=place, requires_grad=True)

    def gradient() -> Tensor:
        return torch.autograd.grad(biased_attention(query, key, value, RelativePositionBias(table)).sum(), table)[0]

    first = gradient()
    assert first.abs().max() > 0
    assert torch.equal(first, gradient())
