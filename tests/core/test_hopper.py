"""The kernels of teams of warps against the oracle, at sizes at which the plan would not choose them.

On a CPU they run in `interpreter.py`. The general kernels, in Triton's, are wrong in bf16 there, which cases for a GPU
leave to them in part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import BROADCASTS, LAYOUTS, Case, build, check, ids, pairwise, run

from flashbias import DenseBias, biased_attention, plan, reference
from flashbias.kernels import ahead, call
from flashbias.tiles import Tiles, triton_version


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, device: str) -> list[tuple[str, Tiles]]:
    """The kernels that teams have launched, and their tiles."""
    if device == "cpu":
        interpret(monkeypatch)
    elif not plan.has_teams(torch.device(device, 0)):
        pytest.skip("teams are for Hopper and triton >= 3.6")
    from flashbias.kernels import hopper, hopper_keys, hopper_queries, hopper_values

    kernels: list[tuple[str, Tiles]] = []
    launch = hopper.launch

    def counted(kernel: Any, call: Any, tiles: Tiles, *rest: Any, **constants: Any) -> None:
        kernels.append((kernel.__name__, tiles))
        launch(kernel, call, tiles, *rest, **constants)

    for module in (hopper, hopper_keys, hopper_queries, hopper_values):
        monkeypatch.setattr(module, "launch", counted)
    monkeypatch.setattr(plan, "TEAM_WORK", 0)
    monkeypatch.setattr(plan, "_processors", lambda device: 1)
    monkeypatch.setattr(ahead, "workers", lambda device: 1)  # nothing is launched but for the result
    return kernels


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels of teams on a CPU, beside the others, which run in Triton's interpreter."""
    if triton_version() < (3, 6):
        pytest.skip("Gluon's language for Hopper is complete from triton 3.6 on")
    import interpreter
    from triton.experimental.gluon._runtime import GluonJITFunction

    from flashbias.kernels import compiled

    launch = compiled.launch

    class Interpreted:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda **arguments: interpreter.run(self.kernel, grid, arguments)

    def launched(kernel: Any, *rest: Any) -> None:
        launch(Interpreted(kernel) if isinstance(kernel, GluonJITFunction) else kernel, *rest)

    monkeypatch.setattr(compiled, "launch", launched)
    monkeypatch.setattr(plan, "has_teams", lambda device: True)
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")


SHAPES: list[dict[str, Any]] = [
    {"n_q": 33, "n_k": 33},
    {"n_q": 65, "n_k": 17, "c": 24},
    {"n_q": 17, "n_k": 270, "c_v": 40},
    {"n_q": 320, "n_k": 200},
    {"n_q": 200, "n_k": 321, "c": 64},
    {"n_q": 257, "n_k": 129, "c": 128},
    {"n_q": 1000, "n_k": 1000, "c": 40, "c_v": 128},
    {"heads": 4, "kv_heads": 2, "n_q": 130, "n_k": 190},
    {"batch": (), "n_q": 40},
    {"batch": (2, 3), "n_q": 100, "n_k": 100, "c": 80},
    {"n_q": 40, "n_k": 1, "scale": 1.0},
    {"n_q": 90, "scale": 0.0},
    {"n_q": 90, "scale": -0.3},
]
CASES = pairwise(
    [{"bias": "none"}, {"bias": "alibi"}, {"bias": "factored+alibi", "rank": 9},
     *({"bias": "factored", "rank": rank} for rank in (1, 16, 33, 96, 128))],
    [{"mask": mask} for mask in ("none", "causal", "causal_offset", "causal_early")],
    [{"dtype": torch.bfloat16}, {"dtype": torch.float16}],
    SHAPES,
    [{"broadcast": broadcast} for broadcast in BROADCASTS],
    [{"layout": layout} for layout in LAYOUTS],
)  # fmt: skip


Served = list[tuple[str, Tiles]]


ALL_BY_TEAMS = pairwise(
    [{"bias": "none"}, {"bias": "alibi"}, {"bias": "factored", "rank": 3}, {"bias": "factored", "rank": 16},
     {"bias": "factored+alibi", "rank": 16}, {"bias": "distance"}],
    [{"mask": mask} for mask in ("none", "causal", "causal_offset", "causal_early")],
    [
        {"n_q": 70, "n_k": 65},
        {"n_q": 17, "n_k": 700, "c": 24},
        {"n_q": 420, "n_k": 20, "c_v": 40},
        {"n_q": 193, "n_k": 270, "c": 64},
        {"n_q": 140, "n_k": 270, "c": 128},
        {"heads": 4, "kv_heads": 2, "n_q": 70},
        {"batch": (), "n_q": 40, "n_k": 2},
    ],
    [{"broadcast": broadcast} for broadcast in ("full", "heads", "last", "missing")],
    [{"layout": layout} for layout in ("contiguous", "transposed", "expanded")],
    base=Case(dtype=torch.bfloat16, scale=0.25),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_accuracy_of_every_pair(case: Case, device: str, served: Served) -> None:
    check(case, device)


@pytest.mark.parametrize("case", ALL_BY_TEAMS, ids=ids(ALL_BY_TEAMS))
def test_accuracy_where_teams_make_all(case: Case, device: str, served: Served) -> None:
    check(case, device)
    assert [name for name, _ in served] == ["forward_teams_kernel", "queries_teams_kernel", "keys_teams_kernel"]


SHARED = pairwise(
    [{"bias": bias} for bias in ("dense", "dense_inf")],
    [
        {"batch": (5,), "n_q": 70, "n_k": 65, "c": 32},
        {"batch": (2, 3), "n_q": 17, "n_k": 700, "c": 24},
        {"batch": (40,), "heads": 1, "n_q": 140, "n_k": 20, "c_v": 40},
        {"batch": (4,), "n_q": 193, "n_k": 270, "c": 64},
        {"batch": (1,), "heads": 4, "kv_heads": 2, "n_q": 130},
    ],
    [{"broadcast": broadcast} for broadcast in ("batch", "missing", "bare")],
    [{"layout": layout} for layout in ("contiguous", "transposed", "expanded")],
    [{"scale": scale} for scale in (None, 0.25, -0.3)],
    base=Case(dtype=torch.bfloat16),
)  # fmt: skip


@pytest.mark.parametrize("case", SHARED, ids=ids(SHARED))
def test_a_dense_bias_of_all_the_batch(case: Case, device: str, served: Served) -> None:
    check(case, device)
    wanted = [f"{name}_teams_kernel" for name in ("forward", "queries", "keys", "values")]
    assert [name for name, _ in served] == wanted


TAILED = pairwise(
    [{"n_k": n_k} for n_k in (2, 20, 65, 72, 73, 80, 81, 96, 97, 129)],
    [{"bias": "dense_ends", "c": 32}, {"bias": "dense_inf"}],
    base=Case(dtype=torch.bfloat16, batch=(3,), heads=1, n_q=20, broadcast="batch"),
)


@pytest.mark.parametrize("short", [plan.SHORT, 0])
@pytest.mark.parametrize("case", TAILED, ids=ids(TAILED))
def test_few_keys_in_the_last_tile(
    case: Case, short: int, device: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By programs that take several tiles of queries, and by others, which long rows have."""
    monkeypatch.setattr(plan, "SHORT", short)
    check(case, device)
    assert len(served) == 4


def test_lengths_share_kernels(device: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashbias.kernels import compiled

    keys = []

    def noted(kernel: Any, grid: Any, arguments: Any, constants: Any, known: Any, key: Any) -> None:
        keys.append((id(known), key, constants()["TAIL"], constants()["WHOLE"], constants()["PERSISTENT"]))

    monkeypatch.setattr(compiled, "launch", noted)
    for n_k in (64, 65, 66, 73, 81, 97, 127, 128, 1024, 1088, 1217, 1218, 1279):
        q, k, v = (torch.zeros(2, 1, n, 16, device=device, dtype=torch.bfloat16) for n in (20, n_k, n_k))
        biased_attention(q, k, v, DenseBias(torch.zeros(1, 1, 20, n_k, device=device, dtype=torch.bfloat16)))
    short = [(64, True), (8, False), (8, False), *[(64, False)] * 4, (64, True), (64, True)]
    long = [(64, False), (8, False), (8, False), (64, False)]
    assert [rest for *_, tail, whole, many in keys for rest in [(tail, whole, many)]] == [
        *[(*case, True) for case in short],
        *[(*case, False) for case in long],
    ]
    assert len(set(keys)) == 3 + 2


@pytest.mark.gpu
@pytest.mark.parametrize(("n_q", "n_k"), [(384, 384), (384, 386), (384, 400), (1100, 1106), (1100, 1140)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_every_call_gives_the_same(n_q: int, n_k: int, layout: str, device: str) -> None:
    """On a full device, where a tile that was given back before it was read would be another one soon."""
    case = Case("dense", dtype=torch.bfloat16, batch=(64,), heads=4, n_q=n_q, n_k=n_k, c=32, layout=layout,
                broadcast="batch")  # fmt: skip
    inputs = build(case, device)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves.items()}

    def once() -> list[torch.Tensor]:
        out = biased_attention(leaves["query"], leaves["key"], leaves["value"], inputs.make_bias(leaves))
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), inputs.cotangents["out"])]

    first = once()
    for _ in range(300):
        assert all(map(torch.equal, once(), first))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("bias", ["distance", "factored", "factored_fp32", "alibi", "dense"])
def test_passes_that_are_made_again_give_the_same_bits(bias: str, device: str, served: Served) -> None:
    case = Case(bias, dtype=torch.bfloat16, n_q=300, n_k=333, c=32, rank=16, scale=0.125, broadcast="batch")
    inputs = [build(replace(case, seed=seed), device) for seed in (0, 1)]

    def attend(number: int) -> torch.Tensor:
        leaves = inputs[number].leaves
        given = (leaves[name] for name in ("query", "key", "value"))
        return biased_attention(*given, inputs[number].make_bias(leaves), scale=case.scale)

    anew = attend(1)
    call.forget()
    for number in (0, 1, 0, 1):
        out = attend(number)
    assert torch.equal(out, anew)
    assert len(served) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_bias_beside_wide_heads(dtype: torch.dtype, device: str, served: Served) -> None:
    """Its gradient comes by the general kernel."""
    check(Case("dense", dtype=dtype, batch=(3,), n_q=65, n_k=270, c=128, broadcast="batch"), device)
    assert [name for name, _ in served] == [f"{name}_teams_kernel" for name in ("forward", "queries", "keys")]


# Triton's interpreter has no products of bf16.
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * torch.cuda.is_available())
@pytest.mark.parametrize(
    "case",
    [
        Case("factored", rank=96, batch=(6,), n_q=70, n_k=150, c=32, broadcast="batch"),
        Case("factored", rank=64, batch=(3, 2), n_q=65, n_k=40, broadcast="bare"),
    ],
    ids=str,
)
def test_factors_of_all_the_batch_are_multiplied_out(
    case: Case, dtype: torch.dtype, device: str, served: Served
) -> None:
    check(replace(case, dtype=dtype), device)
    assert served[-1][0] == "values_teams_kernel"


@pytest.mark.parametrize(
    ("batch", "n", "rank", "wanted"),
    [(1024, 576, 32, True), (1024, 576, 31, False), (64, 144, 32, False), (8, 1024, 32, False)],
    ids=["many", "few columns", "few scores", "few that share it"],
)
def test_where_factors_are_multiplied_out(
    batch: int, n: int, rank: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "has_teams", lambda device: True)
    query = torch.empty(batch, 4, n, 32, dtype=torch.bfloat16, device="meta")
    factor = torch.empty(1, 4, n, rank, dtype=torch.bfloat16, device="meta")
    assert plan.expands(query, n, factor, factor) is wanted


@pytest.mark.parametrize(
    ("c", "mask", "teams"), [(32, "causal", 1), (32, "none", 2), (64, "none", 3), (128, "none", 2)]
)
def test_number_of_teams(c: int, mask: str, teams: int, device: str, served: Served) -> None:
    check(Case("factored", mask, rank=16, dtype=torch.bfloat16, n_q=200, n_k=140, c=c, scale=0.25), device)
    assert served[0][1].teams == teams


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_fp32_have_gradients_better_than_dS_in_half_precision(
    dtype: torch.dtype, device: str, served: Served
) -> None:
    """dS in two halves, and rows of it with the sum that they must have: without either the error is 2^-12 to 2^-8."""
    case = Case("distance", dtype=dtype, n_q=100, n_k=233, c=16)
    inputs = build(case, device)
    exact = run(reference, case, inputs, {name: leaf.double() for name, leaf in inputs.leaves.items()})
    found = run(partial(biased_attention, return_lse=True), case, inputs, inputs.leaves)
    assert [name for name, _ in served] == ["forward_teams_kernel", "queries_teams_kernel", "keys_teams_kernel"]
    for name in ("weight", "x_q", "x_k"):
        error = found[f"gradient of {name}"] - exact[f"gradient of {name}"]
        assert error.norm() < 2**-14 * exact[f"gradient of {name}"].norm(), name


@pytest.mark.gpu
def test_long_rows_and_strides_that_cannot_be_copied(device: str, served: Served) -> None:
    check(Case(bias="alibi", mask="causal", dtype=torch.bfloat16, n_q=4099, n_k=4099, c=64), device)
    assert len(served) == 3
    check(Case(bias="alibi", dtype=torch.bfloat16, n_q=64, n_k=64, c=20), device)  # rows of 40 bytes
    assert len(served) == 3


@pytest.mark.gpu
def test_small_calls_stay_with_the_general_kernels(
    device: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TEAM_WORK", 1 << 27)
    check(Case(bias="alibi", dtype=torch.bfloat16, n_q=64, n_k=64, c=64), device)
    assert not served
