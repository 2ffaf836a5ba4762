"""Factors from a singular value decomposition: the best of their rank, and errors that are what they are said to be."""

import math

import pytest
import torch

from flashbias import DenseBias, biased_attention, decompose, plan, reference
from flashbias.errors import DtypeError, ShapeError, UnsupportedError


def smooth_bias(heads=2, n_q=40, n_k=48, device="cpu"):
    """A bias whose singular values fall fast, with rows of very different means."""
    x, y = torch.linspace(-1, 1, n_q, device=device), torch.linspace(-1, 1, n_k, device=device)
    width = torch.linspace(0.3, 0.6, heads, device=device)[:, None, None]
    return 4 * torch.exp(-(((x[:, None] - y) / width) ** 2)) + 30 * x[:, None]


def test_no_factors_of_that_rank_are_better_without_the_row_means():
    bias = smooth_bias().double()
    found = decompose.svd(bias, rank=3)
    centred = bias - bias.mean(-1, keepdim=True)
    left, spectrum, right = torch.linalg.svd(centred)
    best = left[..., :3] * spectrum[..., None, :3] @ right[..., :3, :]
    torch.testing.assert_close(found.bias().dense(40, 48), best.float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.row_means, bias.mean(-1))
    torch.testing.assert_close(found.spectrum, spectrum)
    torch.testing.assert_close(found.energy, spectrum[:, :3].square().sum(-1) / spectrum.square().sum(-1))
    torch.testing.assert_close(found.bias_error, (centred - best).abs().amax((-2, -1)), rtol=1e-3, atol=1e-4)


def test_what_is_constant_along_rows_costs_no_column():
    constant = torch.randn(2, 40, 1).expand(2, 40, 48)
    assert decompose.svd(constant, tolerance=1e-5).rank == 1
    bias = smooth_bias()
    ours, theirs = (decompose.svd(b, rank=4).output_error for b in (bias, bias + 50 * constant))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0)


def test_all_columns_give_the_bias_and_row_means_the_lse():
    query, key, value = torch.randn(3, 1, 2, 40, 16)
    bias = smooth_bias(n_k=40)
    found = decompose.svd(bias)
    assert found.rank == 40
    out, lse = biased_attention(query, key, value, found.bias(), return_lse=True)
    expected, expected_lse = reference(query, key, value, decompose.svd(bias.double()).bias())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-4)
    whole = reference(query.double(), key.double(), value.double(), found.bias())[1] + found.row_means
    scores = query.double() @ key.double().mT * 16**-0.5 + bias.double()
    torch.testing.assert_close(whole, scores.logsumexp(-1), rtol=0, atol=1e-4)


def test_singular_values_are_spread_evenly():
    found = decompose.svd(smooth_bias().double(), rank=5)
    norms = [factor.norm(dim=-2) for factor in (found.q_factor, found.k_factor)]
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(norms[0].square(), found.spectrum[..., :5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_reported_errors_are_those_of_attention(dtype):
    """Of other queries, keys and values of the same kind, with the factors and with the rounded matrix."""
    bias, scale = smooth_bias(n_q=300, n_k=40).double() * math.pi, torch.tensor([3.0, 20.0])
    found = decompose.svd(bias, rank=9, scale=scale, head_dim=16, dtype=dtype)
    assert found.q_factor.dtype == found.k_factor.dtype == dtype
    query, key = (torch.nn.functional.normalize(torch.randn(2, n, 16).double(), dim=-1) for n in (300, 40))
    query, value = query * scale[:, None, None], torch.randn(2, 40, 16).double()
    exact, _ = reference(query, key, value, DenseBias(bias), scale=1.0)
    for approximation, reported in (
        (found.bias(), found.output_error),
        (DenseBias(bias.to(dtype)), found.table_error),
    ):
        out, _ = reference(query, key, value, approximation, scale=1.0)
        error = (out - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
        assert (error > 0).all()
        assert ((reported / error).log2().abs() < 1).all(), f"{reported} reported, {error} found"
    assert found.excess == (found.output_error - found.table_error).max().item()


def test_smallest_rank_that_meets_a_tolerance():
    bias = smooth_bias()
    found = decompose.svd(bias, tolerance=1e-2)
    assert 1 < found.rank < 40
    assert found.excess <= 1e-2 < decompose.svd(bias, rank=found.rank - 1).excess
    stepped = decompose.svd(bias, tolerance=1e-2, step=8)
    assert stepped.rank == math.ceil(found.rank / 8) * 8
    assert decompose.svd(bias, rank=3, tolerance=1e-2).rank == 3
    assert decompose.svd(bias, rank=3, tolerance=1e-2).excess > 1e-2


def test_error_beyond_that_of_the_rounded_matrix_counts():
    """Half-precision factors of every rank are off by more than 1e-5, and so is the matrix."""
    bias = smooth_bias() - smooth_bias().mean(-1, keepdim=True)
    assert decompose.svd(bias, dtype=torch.float16).output_error.max() > 1e-5
    assert decompose.svd(bias, dtype=torch.float16).table_error.max() > 1e-5
    assert decompose.svd(bias, dtype=torch.float16, tolerance=2e-3).rank < 40


def test_randomised_factors_are_nearly_as_good_and_draw_no_numbers_of_torch():
    bias = smooth_bias(n_q=200, n_k=200) + 0.01 * torch.randn(2, 200, 200)
    state = torch.get_rng_state()
    exact, fast = (decompose.svd(bias, rank=8, randomised=flag) for flag in (False, True))
    assert torch.equal(torch.get_rng_state(), state)
    assert fast.spectrum.shape[-1] < exact.spectrum.shape[-1]
    torch.testing.assert_close(fast.spectrum[..., :8], exact.spectrum[..., :8], rtol=5e-2, atol=0)
    torch.testing.assert_close(fast.energy, exact.energy, rtol=1e-3, atol=0)
    torch.testing.assert_close(fast.output_error, exact.output_error, rtol=0.1, atol=0)
    again = decompose.svd(bias, rank=8, randomised=True)
    assert torch.equal(again.q_factor, fast.q_factor)


@pytest.mark.parametrize("shape", [(5, 7), (3, 6, 4), (2, 3, 4, 6), (1, 1)], ids=str)
def test_any_dimensions_before_the_last_two(shape, device):
    bias = torch.randn(shape, device=device)
    found = decompose.svd(bias, scale=2.0)
    assert found.rank == min(shape[-2:])
    assert found.q_factor.shape == (*shape[:-1], found.rank)
    assert found.k_factor.shape == (*shape[:-2], shape[-1], found.rank)
    assert all(
        value.shape == shape[:-2] for value in (found.energy, found.bias_error, found.output_error, found.table_error)
    )
    assert found.bias_error.max() < 1e-5
    assert not any(value.isnan().any() for value in vars(found).values())


def test_double_precision_stays_double():
    bias = smooth_bias().double()
    found = decompose.svd(bias)
    assert found.q_factor.dtype == torch.float64
    assert found.bias_error.max() < 1e-12
    assert found.table_error.max() == 0


def test_gradients_are_not_recorded():
    assert not decompose.svd(smooth_bias().requires_grad_(), rank=2).q_factor.requires_grad


@pytest.mark.parametrize(
    ("bias", "options", "error", "message"),
    [
        (torch.ones(3), {}, ShapeError, "bias of shape"),
        (torch.ones(2, 0, 3), {}, ShapeError, "not empty"),
        (torch.ones(3, 3), {"rank": 0}, ShapeError, "rank=0.*1 to 3"),
        (torch.ones(3, 3), {"rank": 2.5}, ShapeError, r"rank=2\.5"),
        (torch.ones(3, 3), {"step": 0, "tolerance": 0.1}, ShapeError, "step=0"),
        (torch.ones(3, 3), {"dtype": torch.int8}, DtypeError, "int8"),
        (torch.ones(3, 3, dtype=torch.int32), {}, DtypeError, "int32"),
        (torch.tensor([[1.0, -math.inf]]), {}, UnsupportedError, "infinite.*mask"),
    ],
    ids=["vector", "empty", "rank", "fraction", "step", "factors of integers", "integers", "infinite"],
)
def test_what_cannot_be_decomposed_is_refused(bias, options, error, message):
    with pytest.raises(error, match=message):
        decompose.svd(bias, **options)


def test_factors_pay_where_they_were_measured_to():
    """The measurements of docs/kernels.md: shared factors of rank 16 and 96, and a dense bias that is shared."""
    assert plan.factors_pay(576, 576, 32, 16, 1024, "cuda")
    assert not plan.factors_pay(1218, 1218, 32, 96, 1218, "cuda")
    assert not plan.factors_pay(576, 576, 32, 16, 1024, "cpu")
    assert not plan.factors_pay(576, 576, 32, 16, 1024, "cuda", itemsize=4)
    assert not plan.factors_pay(1, 576, 32, 16, 1024, "cuda")
    pay = [plan.factors_pay(576, 576, 32, rank, 64, "cuda") for rank in range(1, 257)]
    assert pay == sorted(pay, reverse=True), "a higher rank never pays where a lower one does not"
    assert plan.factors_pay(576, 576, 32, 96, 1, "cuda"), "a bias that no rows share has to be read for each"
