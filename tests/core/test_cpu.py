"""The CPU path against the oracle: every bias, mask, dtype and shape, its memory, and what it must never read."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BIASES, BROADCASTS, JOINS, LAYOUTS, MASKS, SUMS, Case, build, check, drawn, ids, pairwise

from flashbias import (
    ALiBi,
    Causal,
    DenseBias,
    FactoredBias,
    KeyPadding,
    SpatialDistance,
    biased_attention,
    cpu,
    cpu_parts,
    plan,
)
from flashbias.masks import Allowed
from flashbias.operands import Operands
from flashbias.reference import reference
from flashbias.testing import assert_as_accurate, eager

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONG = 131_072


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "cpu")


def axis(**values: Any) -> list[dict[str, Any]]:
    """One axis of `pairwise`, from the values of one field."""
    ((name, choices),) = values.items()
    return [{name: choice} for choice in choices]


SHAPES = [
    {},
    {"n_q": 1, "n_k": 40},
    {"n_q": 65, "n_k": 17, "c": 24},
    {"n_q": 17, "n_k": 127, "c_v": 40},
    {"heads": 6, "kv_heads": 2},
    {"heads": 4, "kv_heads": 1, "n_q": 5},
    {"batch": ()},
    {"batch": (), "heads": 1},
    {"batch": (2, 3), "n_q": 15, "n_k": 15},
    {"batch": (2, 1, 3), "n_q": 7, "heads": 3},
    {"n_q": 40, "n_k": 1, "scale": 1.0},
    {"n_k": 0},
    {"n_q": 0},
    {"batch": (0,)},
    {"batch": (2, 0)},
    {"scale": 0.0},
    {"scale": -0.3},
]
BIAS = axis(bias=BIASES + SUMS)
MASK = axis(mask=MASKS + JOINS)
_C = (16, 24, 40, 48, 64, 80, 128, 192, 256)
_C_V = (256, 16, 40, 24, 64, 1, 64, 192, 16)
_RANKS = (1, 2, 3, 96, 16, 5, 128, 8, 1)
WIDTHS = [{"c": c, "c_v": c_v, "rank": rank} for c, c_v, rank in zip(_C, _C_V, _RANKS, strict=True)]

CASES = pairwise(BIAS, MASK, axis(dtype=DTYPES), SHAPES, axis(broadcast=BROADCASTS), axis(layout=LAYOUTS))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_is_as_accurate_as_the_contract_says(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", CASES[::3], ids=ids(CASES[::3]))
def test_is_as_accurate_among_many_scores(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As calls of more scores than others here have are made."""
    monkeypatch.setattr(plan, "FEW_SCORES", 0)
    check(case)


DRAWN = [drawn(seed, DTYPES, lengths=(1, 2, 17, 64, 127, 200)) for seed in range(100)]


@pytest.mark.parametrize("case", DRAWN, ids=[f"{case.seed}-{case}" for case in DRAWN])
def test_is_as_accurate_in_anything(case: Case) -> None:
    check(case)


WIDE = pairwise(WIDTHS, axis(bias=("factored", "alibi", "distance", "dense")), axis(dtype=DTYPES))
WIDE = [replace(case, n_q=129, n_k=127, batch=(), mask=("none", "causal")[i % 2]) for i, case in enumerate(WIDE)]


@pytest.mark.parametrize("case", WIDE, ids=ids(WIDE))
def test_head_dims_and_ranks(case: Case) -> None:
    check(case)


FAR_APART = pairwise(
    axis(bias=("distance_wide", "distance_wide+factored", "distance_wide+distance+alibi")),
    axis(mask=("none", "causal", "lengths", "segments", "allowed")),
    axis(cotangents=("both", "out", "lse")),
    axis(broadcast=BROADCASTS),
)


@pytest.mark.parametrize("case", FAR_APART, ids=ids(FAR_APART))
def test_accuracy_of_points_far_apart(case: Case) -> None:
    check(case)


CUT = pairwise(BIAS, MASK, [shape for shape in SHAPES if 0 not in shape.values()], axis(broadcast=BROADCASTS))


@pytest.mark.parametrize("case", CUT, ids=ids(CUT))
def test_parts_and_blocks_do_not_change_the_result(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same problems, cut into single matrices and a few rows, as long ones are."""
    monkeypatch.setattr(cpu_parts, "BLOCK", 400)
    monkeypatch.setattr(cpu_parts, "MAX_THREADS", 1)
    monkeypatch.setattr(cpu_parts, "ROWS", 16)
    monkeypatch.setattr(cpu_parts, "MIN_ROWS", 7)
    check(case)


COTANGENTS = pairwise(
    axis(cotangents=("out", "lse")), axis(bias=("none", "factored", *SUMS)), axis(mask=("none", "causal_early"))
)


@pytest.mark.parametrize("case", COTANGENTS, ids=ids(COTANGENTS))
def test_one_output_without_a_gradient(case: Case) -> None:
    check(case)


def test_a_gradient_does_not_depend_on_which_others_are_wanted() -> None:
    case = Case("factored+alibi+dense_row", "causal&lengths", heads=4, kv_heads=2, poison=False)
    inputs = build(case)

    def gradients(wanted: list[str]) -> list[torch.Tensor]:
        leaves = {name: leaf.clone().requires_grad_(name in wanted) for name, leaf in inputs.leaves.items()}
        query, key, value = (leaves[name] for name in ("query", "key", "value"))
        out = biased_attention(query, key, value, inputs.make_bias(leaves), mask=inputs.mask)
        return list(torch.autograd.grad(out, [leaves[name] for name in wanted], inputs.cotangents["out"]))

    for name, together in zip(inputs.leaves, gradients(list(inputs.leaves)), strict=True):
        (alone,) = gradients([name])
        torch.testing.assert_close(alone, together, rtol=0, atol=0, msg=name)


LONG_CASES = [
    Case(bias, mask, dtype, n_q=3, n_k=LONG, batch=(), heads=1, c=16)
    for bias, mask in (
        ("alibi", "causal"), ("alibi", "none"), ("alibi_symmetric", "none"), ("alibi_positions", "none"),
        ("distance", "none"), ("factored", "none"),
    )
    for dtype in (torch.float32, torch.bfloat16)
]  # fmt: skip


@pytest.mark.parametrize("case", LONG_CASES, ids=ids(LONG_CASES))
def test_long_keys(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [0.5, 2**-8])
def test_causal_alibi_on_sampled_rows_of_a_long_text(slope: float, dtype: torch.dtype) -> None:
    rows = torch.tensor([0, 1, 63, 4097, 70_000, LONG // 2, LONG - 2, LONG - 1])
    query = torch.randn(1, len(rows), 16).to(dtype).requires_grad_()
    key, value = (torch.randn(1, LONG, 16).to(dtype).requires_grad_() for _ in range(2))
    slopes = torch.tensor([slope], requires_grad=True)
    leaves = (query, key, value, slopes)
    positions = torch.arange(LONG)
    mask = Allowed((positions <= rows[:, None])[None])
    cotangent = torch.randn(1, len(rows), 16)

    def run(function: Any, *leaves: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        *qkv, slopes = leaves
        out, lse = function(*qkv, ALiBi(slopes, q_positions=rows, k_positions=positions), mask=mask, **options)
        return [out, lse, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]

    oracle = run(reference, *(leaf.detach().double().requires_grad_() for leaf in leaves))
    results = zip(run(biased_attention, *leaves, return_lse=True), run(eager, *leaves), oracle, strict=True)
    names = ("out", "lse", "gradient of query", "gradient of key", "gradient of value", "gradient of slopes")
    for name, (result, measure, truth) in zip(names, results, strict=True):
        assert_as_accurate(name, result, measure, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_differences_of_small_positions_do_not_wrap(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, n, 16) for n in (2, 3, 3))
    positions = torch.tensor([0, 120]), torch.tensor([0, 3, 250 if dtype == torch.uint8 else -125])
    wide, small = (
        ALiBi(torch.tensor([0.25]), q_positions=q, k_positions=k)
        for q, k in (positions, [position.to(dtype) for position in positions])
    )
    assert torch.equal(small.dense(2, 3), wide.dense(2, 3))
    assert torch.equal(biased_attention(query, key, value, small), biased_attention(query, key, value, wide))


def test_nothing_beyond_the_lengths_is_read_not_even_positions() -> None:
    n = 9
    query, key, value = (torch.randn(2, 1, n, 16) for _ in range(3))
    slopes = torch.tensor([0.3], requires_grad=True)
    k_positions = torch.rand(2, n)
    lengths = torch.tensor([4, 0])
    results = []
    for filler in (0.0, torch.nan, torch.inf):
        beyond = torch.arange(n) >= lengths[:, None]
        fill = [tensor.masked_fill(beyond[:, None, :, None], filler) for tensor in (key, value)]
        bias = ALiBi(slopes, q_positions=torch.rand(n).zero_(), k_positions=k_positions.masked_fill(beyond, filler))
        out, lse = biased_attention(query, *fill, bias, mask=KeyPadding(lengths), return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out.sum() + lse[0].sum(), slopes)))
    for other in results[1:]:
        for result, first in zip(other, results[0], strict=True):
            assert torch.equal(result, first)
    assert (results[0][1][1] == -torch.inf).all()


def test_nan_reaches_the_rows_that_see_it_and_no_others() -> None:
    query, key, value = (torch.randn(1, 2, 6, 16) for _ in range(3))
    clean = biased_attention(query, key, value, is_causal=True)
    query[0, 0, 2, 3] = torch.nan
    key[0, 1, 4, 0] = torch.nan
    out, lse = biased_attention(query, key, value, is_causal=True, return_lse=True)
    seen = torch.zeros(1, 2, 6, dtype=torch.bool)
    seen[0, 0, 2] = seen[0, 1, 4:] = True
    assert torch.equal(out.isnan(), seen[..., None].expand_as(out))
    assert torch.equal(lse.isnan(), seen)
    assert torch.equal(out[~seen], clean[~seen])


def test_results_are_fresh_and_contiguous() -> None:
    query, key, value = (torch.randn(2, 3, 5, 16).mT.contiguous().mT for _ in range(3))
    operands = Operands(values=torch.randn(5, 5))
    results = list(cpu.forward(query, key, value, operands, 0.25))
    names = {"query", "key", "value", "values"}
    inputs = (query, key, value, operands.values)
    out, lse = results
    results += cpu.backward(out, None, out, lse, query, key, value, operands, 0.25, names).values()
    pointers = {tensor.untyped_storage().data_ptr() for tensor in (*results, *inputs)}
    assert len(pointers) == len(results) + len(inputs)
    assert all(tensor.is_contiguous() for tensor in results)


def test_half_precision_is_computed_in_fp32_inside_autocast_too() -> None:
    case = Case("factored_fp32", dtype=torch.bfloat16, n_k=300)
    inputs = build(case)
    query, key, value = (inputs.leaves[name] for name in ("query", "key", "value"))
    outside = biased_attention(query, key, value, inputs.make_bias(inputs.leaves), return_lse=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = biased_attention(query, key, value, inputs.make_bias(inputs.leaves), return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_defaults_of_torch_do_not_matter() -> None:
    query, key, value = (torch.randn(1, 2, 8, 16) for _ in range(3))
    biases = ALiBi(torch.rand(2)) + DenseBias(torch.randn(8, 8)) + SpatialDistance(*torch.rand(2, 8, 3), torch.rand(8))
    wanted = biased_attention(query, key, value, biases, mask=Causal())
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        result = cpu.forward(query, key, value, Operands(slopes=torch.ones(2, device="cpu").float()), 0.25)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert result[0].dtype == wanted.dtype
    assert torch.equal(result[0], biased_attention(query, key, value, ALiBi(torch.ones(2)), scale=0.25))


def test_repeats_bit_for_bit() -> None:
    leaves = [torch.randn(4, 2, 64, 16, requires_grad=True) for _ in range(3)]
    factors = [torch.randn(64, 4, requires_grad=True) for _ in range(2)]

    def run() -> list[torch.Tensor]:
        out = biased_attention(*leaves, FactoredBias(*factors), is_causal=True)
        return [out, *torch.autograd.grad(out.sum(), [*leaves, *factors])]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


PROBLEMS = {
    # One matrix of scores would take 256 MiB.
    "long": (
        "q, k, v = (torch.randn(1, 8192, 16, requires_grad=True) for _ in range(3))",
        "FactoredBias(*(torch.randn(1, 8192, 4, requires_grad=True) for _ in range(2)))",
    ),
    # One matrix of distances would take 256 MiB.
    "positions": (
        "q, k, v = (torch.randn(1, 8192, 16, requires_grad=True) for _ in range(3))",
        "ALiBi(torch.rand(1, requires_grad=True), symmetric=True)",
    ),
    # One matrix of a table's entries would take 256 MiB.
    "table": (
        "q, k, v = (torch.randn(1, 8192, 16, requires_grad=True) for _ in range(3))",
        "RelativePositionBias(torch.randn(1, 8191, requires_grad=True))",
    ),
    # Keys and values repeated for the query heads would take 256 MiB.
    "grouped": (
        "q, k, v = (torch.randn(h, n, 64, requires_grad=True) for h, n in ((64, 1), (1, 8192), (1, 8192)))",
        "DenseBias(torch.randn(1, 8192, requires_grad=True))",
    ),
    # The gradient of the bias before it is summed over the batch would take 256 MiB.
    "shared": (
        "q, k, v = (torch.randn(64, 4, 512, 1, requires_grad=True) for _ in range(3))",
        "DenseBias(torch.randn(4, 512, 512, requires_grad=True))",
    ),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of its memory from /proc")
@pytest.mark.parametrize("name", PROBLEMS)
def test_memory_does_not_grow_with_the_square(name: str) -> None:
    tensors, bias = PROBLEMS[name]
    script = f"""
        import torch
        from flashbias import ALiBi, DenseBias, FactoredBias, RelativePositionBias, biased_attention

        def peak():
            with open("/proc/self/status") as lines:
                return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

        torch.set_num_threads(1)
        small = torch.randn(1, 2, 16, requires_grad=True)
        biased_attention(small, small, small).sum().backward()
        {tensors}
        bias = {bias}
        before = peak()
        biased_attention(q, k, v, bias).sum().backward()
        print(peak() - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 100, f"{run.stdout} MiB more at the peak"
