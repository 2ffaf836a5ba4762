"""Factors as the tensor cores take them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashbias.kernels.columns import MIN_WIDTH, gradient_columns, score_columns

# Through the interpreter, bf16 is cut off where a GPU rounds.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
# What is lost of the largest product: the rounding of fp32; of a pair of halves, the product of its low ones.
LOSS = {torch.float32: 2**-23, torch.float16: 2**-20, torch.bfloat16: 2**-20}


def factors(rank: int, device: str, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors that broadcast against each other, of very different sizes in each column."""
    sizes = torch.logspace(-3, 3, rank, device=device)
    q, k = torch.randn(2, 3, 37, rank, device=device), torch.randn(1, 3, 29, rank, device=device)
    return q * size * sizes, k / sizes


def products(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("...ic,...jc->...ij", q.double(), k.double())


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("rank", [1, 5, 16, 48])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_fp32_factors(dtype: torch.dtype, rank: int, size: float, device: str) -> None:
    q, k = factors(rank, device, size)
    columns = score_columns(q, k, dtype, 0.3)
    assert columns.folded
    assert columns.q.shape[-1] == columns.k.shape[-1]
    assert columns.q.shape[-1] % MIN_WIDTH == 0
    # Each column's largest product is what its halves are good to.
    largest = sum((q[..., r].abs().max() * k[..., r].abs().max()).item() for r in range(rank)) / 0.3
    error = products(columns.q, columns.k) - products(q, k) / 0.3
    assert error.abs().max() <= LOSS[dtype] * largest


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_factors_of_16_bits_stay_what_they_are(dtype: torch.dtype, rank: int, device: str) -> None:
    q, k = (factor.to(dtype) for factor in factors(rank, device))
    columns = score_columns(q, k, dtype, 1.0)
    for given, made in ((q, columns.q), (k, columns.k)):
        torch.testing.assert_close(made[..., :rank], given, rtol=0, atol=0)
        assert not made[..., rank:].any()
    assert (columns.q is q) == (rank == 16)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_a_strange_number_spoils_its_row_only(strange: float, device: str) -> None:
    q, k = factors(5, device)
    spoilt = q.clone()
    spoilt[0, 0, 7, 2] = strange
    columns, wanted = score_columns(spoilt, k, torch.float16, 0.3), score_columns(q, k, torch.float16, 0.3)
    rows = torch.ones(q.shape[:-1], dtype=torch.bool, device=device)
    rows[0, 0, 7] = False
    torch.testing.assert_close(columns.q[rows], wanted.q[rows], rtol=0, atol=0)
    torch.testing.assert_close(columns.k, wanted.k, rtol=0, atol=0)
    assert not columns.q[~rows].isfinite().all()


@pytest.mark.parametrize("view", ["transposed", "expanded", "every other"])
def test_factors_of_any_strides(view: str, device: str) -> None:
    q, k = factors(5, device)
    plain = {
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
        "every other": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    }[view]
    columns, wanted = (
        score_columns(*(change(plain(factor)) for factor in (q, k)), torch.float16, 0.3)
        for change in (lambda x: x, Tensor.contiguous)
    )
    torch.testing.assert_close(columns.q, wanted.q, rtol=0, atol=0)
    torch.testing.assert_close(columns.k, wanted.k, rtol=0, atol=0)


@pytest.mark.parametrize("step", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_for_gradients(dtype: torch.dtype, step: int, device: str) -> None:
    """Each column to a pair of halves' part of its largest number, also beyond the range of fp16."""
    factor = factors(5, device, 1e6)[0]
    columns = gradient_columns(factor, dtype, step)
    assert columns.columns.dtype == dtype
    assert columns.columns.shape[-1] == step
    loss = {torch.float32: 0.0, torch.float16: 2**-21, torch.bfloat16: 2**-16}[dtype]
    error = (columns.combine(columns.columns.float()) - factor).abs().amax((0, 1, 2))
    assert (error <= loss * factor.abs().amax((0, 1, 2))).all()
