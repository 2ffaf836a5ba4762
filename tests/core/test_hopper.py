"""The kernel of teams of warps against the oracle, at sizes at which the plan would not choose it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BROADCASTS, LAYOUTS, Case, check, ids, pairwise

from flashbias import plan

pytestmark = pytest.mark.gpu


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, device: str) -> list[plan.Tiles]:
    """The tiles of all calls that teams have served."""
    if not plan.has_teams(torch.device(device, 0)):
        pytest.skip("teams are for Hopper and triton >= 3.6")
    from flashbias.kernels import hopper

    tiles: list[plan.Tiles] = []
    forward = hopper.forward

    def counted(call: Any, chosen: plan.Tiles, *made: torch.Tensor) -> None:
        tiles.append(chosen)
        forward(call, chosen, *made)

    monkeypatch.setattr(hopper, "forward", counted)
    monkeypatch.setattr(plan, "TEAM_WORK", 0)
    monkeypatch.setattr(plan, "_processors", lambda device: 1)
    return tiles


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


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_accuracy_of_every_pair(case: Case, device: str, served: list[plan.Tiles]) -> None:
    check(case, device)


def test_every_number_of_teams_serves(device: str, served: list[plan.Tiles]) -> None:
    for c, teams in ((32, 1), (64, 3), (128, 2)):
        check(Case(bias="factored", rank=16, dtype=torch.bfloat16, n_q=300, n_k=300, c=c, scale=0.25), device)
        assert served[-1].teams == teams


def test_long_rows_and_strides_that_cannot_be_copied(device: str, served: list[plan.Tiles]) -> None:
    check(Case(bias="alibi", mask="causal", dtype=torch.bfloat16, n_q=4099, n_k=4099, c=64), device)
    assert len(served) == 1
    check(Case(bias="alibi", dtype=torch.bfloat16, n_q=64, n_k=64, c=20), device)  # rows of 40 bytes
    assert len(served) == 1
