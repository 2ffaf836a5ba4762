"""The kernel of teams of warps against the oracle, at sizes at which the plan would not choose it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BROADCASTS, LAYOUTS, Case, check, ids, pairwise

from flashbias import plan

pytestmark = pytest.mark.gpu


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, device: str) -> list[tuple[str, plan.Tiles]]:
    """The kernels that teams have launched, and their tiles."""
    if not plan.has_teams(torch.device(device, 0)):
        pytest.skip("teams are for Hopper and triton >= 3.6")
    from flashbias.kernels import hopper, hopper_keys, hopper_queries

    kernels: list[tuple[str, plan.Tiles]] = []
    launch = hopper.launch

    def counted(kernel: Any, call: Any, tiles: plan.Tiles, *rest: Any) -> None:
        kernels.append((kernel.__name__, tiles))
        launch(kernel, call, tiles, *rest)

    for module in (hopper, hopper_keys, hopper_queries):
        monkeypatch.setattr(module, "launch", counted)
    monkeypatch.setattr(plan, "TEAM_WORK", 0)
    monkeypatch.setattr(plan, "_processors", lambda device: 1)
    return kernels


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


Served = list[tuple[str, plan.Tiles]]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_accuracy_of_every_pair(case: Case, device: str, served: Served) -> None:
    check(case, device)


@pytest.mark.parametrize(("c", "teams"), [(32, 1), (64, 3), (128, 2)])
def test_all_kernels_serve(c: int, teams: int, device: str, served: Served) -> None:
    case = Case(bias="factored", rank=16, dtype=torch.bfloat16, n_q=300, n_k=300, c=c, scale=0.25)
    check(case, device)
    assert [name for name, _ in served] == ["forward_teams_kernel", "queries_teams_kernel", "keys_teams_kernel"]
    assert served[0][1].teams == teams


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_fp32_have_their_gradients_by_the_general_kernels(
    dtype: torch.dtype, device: str, served: Served
) -> None:
    check(Case(bias="distance", dtype=dtype, n_q=300, n_k=333, c=16), device)
    assert [name for name, _ in served] == ["forward_teams_kernel"]


def test_long_rows_and_strides_that_cannot_be_copied(device: str, served: Served) -> None:
    check(Case(bias="alibi", mask="causal", dtype=torch.bfloat16, n_q=4099, n_k=4099, c=64), device)
    assert len(served) == 3
    check(Case(bias="alibi", dtype=torch.bfloat16, n_q=64, n_k=64, c=20), device)  # rows of 40 bytes
    assert len(served) == 3


def test_small_calls_stay_with_the_general_kernels(
    device: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "TEAM_WORK", 1 << 27)
    check(Case(bias="alibi", dtype=torch.bfloat16, n_q=64, n_k=64, c=64), device)
    assert not served
