"""Factors that are multiplied out to a dense bias."""

from __future__ import annotations

import pytest
import torch
from cases import Case, check, ids
from torch import Tensor

from flashbias import FactoredBias, biased_attention, reference
from flashbias import plan as decisions
from flashbias.kernels import call, expansion, replay
from flashbias.testing import assert_as_accurate, eager


@pytest.fixture(autouse=True)
def _multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """All factors that all the batch shares, wherever it pays."""
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    monkeypatch.setattr(
        decisions, "expands", lambda query, n_k, *factors: all(factor.shape[:-3].numel() == 1 for factor in factors)
    )


SHAPES = [
    ((4,), (4,), 9, 17),
    ((1, 4), (1, 4), 9, 16),
    ((1, 1, 4), (), 7, 33),
    ((), (1, 4), 3, 5),
    ((1, 1), (1, 1), 20, 1),
    ((4,), (1,), 1, 5),
]


@pytest.mark.parametrize(("left", "right", "n_q", "n_k"), SHAPES, ids=str)
def test_they_lie_as_kernels_read_them(
    left: tuple[int, ...], right: tuple[int, ...], n_q: int, n_k: int, device: str
) -> None:
    q_factor = torch.randn(*left, n_q, 70, device=device).half()
    k_factor = torch.randn(*right, 70, n_k, device=device).half().mT
    values = expansion._in_rows(q_factor, k_factor)
    wanted = q_factor.double() @ k_factor.double().mT
    torch.testing.assert_close(values.double(), wanted.view(values.shape), rtol=1e-3, atol=2e-2)
    assert call._aligned(values) is values


CASES = [
    Case("factored", broadcast="batch", n_q=20, n_k=33, dtype=torch.float16),
    Case("factored", "lengths", broadcast="missing", n_q=17, n_k=9, dtype=torch.float16),
    Case("factored", broadcast="bare", batch=(2, 3), n_q=1, n_k=37, heads=4, kv_heads=2),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_output_and_gradients(case: Case, device: str) -> None:
    check(case, device)


def test_gradients_of_factors_inside_autocast(device: str) -> None:
    """As outside: sums over the batch would be rounded to half precision."""
    leaves = [torch.randn(1, 2, n, 5, device=device).half().requires_grad_() for n in (9, 13)]
    query, key, value = (torch.randn(3, 2, n, 16, device=device).half() for n in (9, 13, 13))
    out = biased_attention(query, key, value, FactoredBias(*leaves)).float().sum() * 1e-3
    wanted = torch.autograd.grad(out, leaves, retain_graph=True)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        for gradient, truth in zip(torch.autograd.grad(out, leaves), wanted, strict=True):
            assert torch.equal(gradient, truth)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True], ids=["heads", "shared by heads"])
def test_calls_without_gradients_are_passes_as_a_whole(shared: bool, device: str) -> None:
    def factor(n: int) -> Tensor:
        return torch.randn(1, 1 if shared else 2, n, 5, device=device).half()

    for _ in range(3):
        query, key, value = (torch.randn(3, 2, n, 16, device=device).half() for n in (9, 13, 13))
        bias = FactoredBias(factor(9), torch.randn(2, 13, 5, device=device).half())
        out = biased_attention(query, key, value, bias)
        truth, measure = (f(query, key, value, bias)[0] for f in (reference, eager))
        assert_as_accurate("out", out, measure, truth, query.dtype)
        assert [made is not None for made in replay._passes.values()] == [True]
