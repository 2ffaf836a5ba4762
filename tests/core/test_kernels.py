"""The Triton kernels against the oracle: on a GPU as they are, elsewhere through Triton's interpreter."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from cases import BIASES, BROADCASTS, JOINS, LAYOUTS, MASKS, SUMS, Case, build, check, drawn, ids, pairwise, run

from flashbias import biased_attention, plan, reference
from flashbias.kernels import call
from flashbias.testing import eager

ON_GPU = torch.cuda.is_available()
# The interpreter's bf16 product is wrong.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)
with_lse = partial(biased_attention, return_lse=True)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")


def axis(**values: Any) -> list[dict[str, Any]]:
    """One axis of `pairwise`, from the values of one field."""
    ((name, choices),) = values.items()
    return [{name: choice} for choice in choices]


# Several tiles of either side, or one: then something else is special.
SHAPES = [
    {"n_q": 33, "n_k": 33},
    {"n_q": 1, "n_k": 40},
    {"n_q": 65, "n_k": 17, "c": 24},
    {"n_q": 17, "n_k": 70, "c_v": 40},
    {"n_q": 21, "n_k": 21, "heads": 4, "kv_heads": 2},
    {"n_q": 33, "n_k": 33, "batch": ()},
    {"n_q": 15, "n_k": 15, "batch": (2, 3)},
    {"n_q": 40, "n_k": 1, "scale": 1.0},
    {"n_q": 21, "n_k": 21, "c": 32, "scale": 0.25},
    {"n_q": 21, "n_k": 21, "scale": 0.0},
    {"n_q": 21, "n_k": 21, "scale": -0.3},
]
SMALL = pairwise(
    axis(bias=(*BIASES, *SUMS)),
    axis(mask=(*MASKS, *JOINS)),
    axis(dtype=DTYPES),
    SHAPES,
    axis(broadcast=BROADCASTS),
    axis(layout=LAYOUTS),
    axis(cotangents=("both", "out", "lse")),
)


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_accuracy_of_every_pair(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", SMALL[::2], ids=ids(SMALL[::2]))
def test_accuracy_among_many_scores(case: Case, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """As calls of more scores than others here have are made."""
    monkeypatch.setattr(plan, "FEW_SCORES", 0)
    check(case, device)


RANKS = pairwise(
    axis(bias=("factored", "factored_fp32")),
    axis(rank=(1, 2, 5, 8, 9, 16, 24, 48, 96, 100, 128)),
    axis(dtype=DTYPES),
    axis(scale=(None, 0.25)),
    axis(c=(16, 64)),
)


@pytest.mark.parametrize("case", RANKS, ids=ids(RANKS))
def test_accuracy_of_every_rank(case: Case, device: str) -> None:
    check(case, device)


# Near points far from the middle: their squares are thousands of times as large as their distances'.
WIDE = pairwise(
    axis(bias=("distance_wide", "distance_wide+factored", "distance_wide+distance+alibi")),
    axis(mask=("none", "causal", "lengths", "segments", "allowed")),
    axis(cotangents=("both", "out", "lse")),
    axis(broadcast=BROADCASTS),
    axis(c=(16, 40, 128, 160)),
    axis(scale=(None, 0.3)),
)


@pytest.mark.parametrize("case", WIDE, ids=ids(WIDE))
def test_accuracy_of_points_far_apart(case: Case, device: str) -> None:
    if not plan.has_doubles(torch.device(device)) or plan.sums_doubles(case.dtype, torch.device(device)):
        pytest.skip("digits of distances beyond those of fp32 need products of float64: these units, triton 3.6")
    check(case, device)


HEAD_DIMS = pairwise(
    axis(c=(1, 16, 24, 40, 48, 64, 80, 128, 192, 256)),
    axis(bias=("none", "factored", "dense", "alibi")),
    axis(dtype=DTYPES),
    axis(c_v=(None, 16, 72)),
    base=Case(heads=1, batch=(1,)),
)


@pytest.mark.parametrize("case", HEAD_DIMS, ids=ids(HEAD_DIMS))
def test_accuracy_of_every_head_dim(case: Case, device: str) -> None:
    check(case, device)


DRAWN = [drawn(seed, DTYPES, lengths=(1, 3, 15, 33)) for seed in range(12)]


@pytest.mark.parametrize("case", DRAWN, ids=[f"{case.seed}-{case}" for case in DRAWN])
def test_accuracy_of_anything(case: Case, device: str) -> None:
    check(case, device)


# Deltas are off by the rounding of outputs, and nothing scales it down.
ONE_KEY = [
    Case("distance", "lengths", torch.float16, (), 1, n_q=3, n_k=64, c=24, c_v=33, broadcast="bare",
         cotangents="out", scale=1.0, seed=977397),
    Case("dense_row+dense_row", "causal_early&segments", torch.float16, n_q=15, n_k=16, c=64, broadcast="missing",
         layout="expanded", scale=1.0, seed=380292),
    Case("alibi_positions", "causal_offset&lengths", torch.float16, (1,), 2, 1, 7, 2, 16, 64, broadcast="bare",
         layout="strided", scale=1.0, seed=897120),
]  # fmt: skip


@pytest.mark.parametrize("case", ONE_KEY, ids=ids(ONE_KEY))
def test_rows_that_attend_to_one_key_have_no_gradient_of_scores(case: Case, device: str) -> None:
    check(case, device)


PARTS = pairwise(
    axis(bias=("none", "alibi", "dense", "factored_fp32", "factored+alibi")),
    axis(mask=("none", "causal", "causal_early", "lengths", "segments")),
    axis(dtype=DTYPES),
    [{"n_q": 1, "n_k": 129}, {"n_q": 5, "n_k": 64}, {"n_q": 40, "n_k": 97}, {"n_q": 1, "n_k": 3}],
    axis(cotangents=("both", "out", "lse")),
)


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("case", PARTS, ids=ids(PARTS))
def test_programs_share_the_keys_of_a_tile(
    case: Case, splits: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(plan, "key_splits", lambda *args: splits)
    check(case, device)


def test_keys_are_shared_where_queries_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_processors", lambda device: 100)
    device = torch.device("cuda")
    assert plan.key_splits(8, 32768, device) == 25
    assert plan.key_splits(8, 1024, device) == 2  # no less than `plan.PART` keys for each
    assert plan.key_splits(1, 10**6, device) == 64
    assert plan.key_splits(101, 32768, device) == 1
    assert plan.key_splits(8, 100, device) == 1


SUM_CASES = [
    Case(bias=bias, n_q=33, n_k=17, c=24, batch=(), broadcast="bare", scale=0.2)
    for bias in ("alibi_float", "table_single", "table")
]


@pytest.mark.parametrize("case", SUM_CASES, ids=ids(SUM_CASES))
def test_sums_over_all_scores_are_several_times_better_than_eager(case: Case, device: str) -> None:
    """Else a gradient that is one of them misses its bound wherever an eager computation errs less than mostly."""
    if not plan.has_doubles(torch.device(device)):
        pytest.skip("scores in float64 need a device that has units for them")
    ratios = []
    for seed in range(20):
        inputs = build(replace(case, seed=seed), device)
        name = "gradient of slopes" if "slopes" in inputs.leaves else "gradient of table"
        doubles = {leaf: tensor.double() for leaf, tensor in inputs.leaves.items()}
        truth = run(reference, case, inputs, doubles)[name]
        ours, theirs = (run(attend, case, inputs, inputs.leaves)[name] for attend in (with_lse, eager))
        ratios.append(float((ours - truth).abs().max() / (theirs - truth).abs().max()))
    assert statistics.median(ratios) < 0.25


ALL_CASES = [
    Case(bias=bias, n_q=33, n_k=17, c=24, batch=(), broadcast="bare", scale=0.2) for bias in ("factored", "dense")
]


GAINING = [f"gradient of {name}" for name in ("query", "key", "q_factor", "k_factor", "values")]


@pytest.mark.parametrize("case", ALL_CASES, ids=ids(ALL_CASES))
def test_output_and_gradients_gain_by_scores_in_float64(
    case: Case, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if not plan.has_doubles(torch.device(device)):
        pytest.skip("scores in float64 need a device that has units for them")
    ratios: dict[str, list[float]] = {}
    for seed in range(12):
        inputs = build(replace(case, seed=seed), device)
        doubles = {leaf: tensor.double() for leaf, tensor in inputs.leaves.items()}
        truth = run(reference, case, inputs, doubles)
        made = []
        for has_doubles in (True, False):
            monkeypatch.setattr(plan, "has_doubles", lambda device, has=has_doubles: has)
            call.forget()
            made.append(run(with_lse, case, inputs, inputs.leaves))
        for name in truth.keys() - {"lse"}:  # whose error is that of its own rounding
            exactly, plainly = (float((some[name] - truth[name]).abs().max()) for some in made)
            ratios.setdefault(name, []).append(exactly / plainly)
    medians = {name: statistics.median(found) for name, found in ratios.items()}
    assert len(medians) > 4
    assert max(medians.values()) < 1.05, medians  # products of probabilities and values are as they were
    assert all(medians.get(name, 0.0) < 0.85 for name in GAINING), medians


@pytest.mark.parametrize("case", SUM_CASES, ids=ids(SUM_CASES))
def test_among_many_scores_sums_in_float64_leave_other_gradients_as_they_are(
    case: Case, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(plan, "FEW_SCORES", case.n_q)
    call.forget()
    inputs = build(case, device)
    made = run(with_lse, case, inputs, inputs.leaves)
    monkeypatch.setattr(plan, "has_doubles", lambda device: False)
    call.forget()
    without = run(with_lse, case, inputs, inputs.leaves)
    different = {name for name, tensor in made.items() if not torch.equal(tensor, without[name])}
    assert different <= {"gradient of slopes", "gradient of table"}


LENGTHS = [*((n, n) for n in (1, 15, 17, 127, 129, 1000)), (17, 1000), (1000, 129), (1, 1000)]
PRODUCT = list(product((*BIASES, *SUMS), (*MASKS, *JOINS)))


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(PRODUCT)), ids=["-".join(pair) for pair in PRODUCT])
def test_accuracy_of_the_full_product(number: int, device: str) -> None:
    """Every bias with every mask in every dtype and at every length, with all other sizes in turn."""
    bias, mask = PRODUCT[number]
    failures = []
    for i, dtype in enumerate(DTYPES):
        turn = number * len(DTYPES) + i
        case = Case(
            bias=bias, mask=mask, dtype=dtype, seed=turn, heads=4, kv_heads=(None, 2, 1)[turn % 3],
            c=(16, 24, 40, 48, 64, 80, 128, 192, 256)[turn % 9], c_v=(None, None, 32, 64)[turn % 4],
            rank=(1, 4, 16, 33, 96, 128)[turn % 6], broadcast=BROADCASTS[turn % len(BROADCASTS)],
            layout=LAYOUTS[turn % len(LAYOUTS)],
        )  # fmt: skip
        for n_q, n_k in LENGTHS:
            try:
                check(replace(case, n_q=n_q, n_k=n_k), device)
            except AssertionError as error:
                failures.append(str(error))
    assert not failures, f"{len(failures)} of {len(DTYPES) * len(LENGTHS)}:\n" + "\n".join(failures)
