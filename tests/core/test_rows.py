"""Dense biases whose heads lie side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashbias import DenseBias, biased_attention, reference
from flashbias.kernels import ahead, call, rows
from flashbias.testing import assert_as_accurate, eager


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")


def pairs(heads: int, n_q: int, n_k: int, dtype: torch.dtype, device: str) -> Tensor:
    """As a projection of pairs `(Nq, Nk, channels)` leaves them, `(1, H, Nq, Nk)`."""
    return torch.randn(n_q, n_k, heads, device=device).to(dtype).movedim(-1, 0)[None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "n_q", "n_k"), [(4, 5, 9), (2, 1, 40), (3, 7, 16), (24, 3, 130), (16, 2, 600)])
def test_rows_are_the_same_bits(heads: int, n_q: int, n_k: int, dtype: torch.dtype, device: str) -> None:
    values = pairs(heads, n_q, n_k, dtype, device)
    assert rows.are_abreast(values)
    width = -(-n_k // 16) * 16
    made = rows.in_rows(values, width)
    assert made.stride()[-3:] == (n_q * width, width, 1)
    assert torch.equal(made, values)
    apart = torch.randn(n_q, 2, n_k, heads, device=device).to(dtype)[:, 1].movedim(-1, 0)
    assert rows.are_abreast(apart)
    assert torch.equal(rows.in_rows(apart, width), apart)


def test_others_are_none_of_these(device: str) -> None:
    x = torch.randn(2, 4, 5, 9, device=device)
    for values in (x, x[:1], x.mT, x[0, 0], x.movedim(1, -1).contiguous().movedim(-1, 1), x[:1, :1].transpose(1, 3)):
        assert not rows.are_abreast(values)


@pytest.mark.parametrize("n", [20, 33])
def test_attention_reads_them_through_that_copy(n: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    made = []

    def noted(values: torch.Tensor, width: int) -> torch.Tensor:
        if not ahead.is_surveying():  # on a GPU the first call is gone through once more to find its kernels
            made.append(width)
        return rows.in_rows(values, width)

    monkeypatch.setattr(call, "in_rows", noted)
    for _ in range(2):  # the second call is made from notes
        q, k, v = torch.randn(3, 2, 4, n, 16, device=device).half()
        values = pairs(4, n, n, torch.float16, device)
        bias = DenseBias(values)
        with torch.no_grad():
            out = biased_attention(q, k, v, bias)
        oracle = reference(q, k, v, bias)[0]
        assert_as_accurate("out", out, eager(q, k, v, bias)[0], oracle, q.dtype)
    assert made == [-(-n // 8) * 8]
