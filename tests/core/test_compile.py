"""The kernels, compiled for every architecture of the contract: they fit its shared memory and spill no register.

In the whole of the full product a few of fp32 still do (docs/kernels.md, "Open").

Compilers need no GPU. They do need processes without TRITON_INTERPRET, which these tests start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, pairwise

from flashbias.tiles import triton_version

HERE = Path(__file__).parent
# Bytes that one block can have (CUDA C++ programming guide, table of technical specifications per compute capability).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Compilation(Case):
    """A case, and how its kernels are compiled: for an architecture, with teams of warps, as those of many scores."""

    arch: int = 90
    teams: bool = False
    many: bool = False
    n_q: int = 64
    n_k: int = 64

    def __str__(self) -> str:
        return f"sm_{self.arch}-{'teams-' if self.teams else ''}{'many-' if self.many else ''}{super().__str__()}"

    @property
    def spills_allowed(self) -> int:
        """Bytes that a thread of teams may spill.

        By triton 3.9, mostly at diagonals; 3.6, with which their tiles were measured, spills a quarter.
        """
        return 192 if self.teams and ("factored" in self.bias or self.mask == "causal") else 0


ARCHITECTURES = [{"arch": arch} for arch in SHARED_LIMIT]
HEAD_DIMS: list[dict[str, Any]] = [{"c": c} for c in (64, 16, 128, 32, 256)]
DTYPES = [{"dtype": dtype} for dtype in (torch.bfloat16, torch.float32, torch.float16)]
BIASES: list[dict[str, Any]] = [
    {"bias": "none"},
    {"bias": "factored", "rank": 16},
    {"bias": "factored", "rank": 96},
    {"bias": "factored_fp32", "rank": 16},
    {"bias": "dense"},
    {"bias": "alibi_symmetric"},
    {"bias": "alibi_positions"},
    {"bias": "table"},
    {"bias": "distance"},
]
MASKS = [{"mask": mask} for mask in ("none", "causal", "segments", "allowed")]
# The axes of the full product that the pairs leave out.
MORE_BIASES = [{"bias": "factored", "rank": 128}, {"bias": "factored_fp32", "rank": 128}, {"bias": "alibi"}]
LENGTHS = [{"n_q": n, "n_k": n} for n in (64, 1024)]


def compiled(cases: list[Compilation], processes: int = 2) -> list[dict[str, Any]]:
    """What `crosscompile.py` reports of the kernels of these cases, forward and backward."""
    lines = [json.dumps(vars(case) | {"dtype": str(case.dtype).removeprefix("torch.")}) for case in cases]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}

    def run(part: int) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, HERE / "crosscompile.py"], input="\n".join(lines[part::processes]),
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        return [answer | {"case": cases[part + processes * answer["case"]]} for answer in answers]

    with ThreadPoolExecutor(processes) as pool:
        return [report for reports in pool.map(run, range(processes)) for report in reports]


def faults(reports: list[dict[str, Any]]) -> list[str]:
    """What is wrong with these kernels, one line each."""
    found = []
    for report in reports:
        case = report["case"]
        if "error" in report:
            found.append(f"{case}: {report['error']}")
            continue
        name = f"{report['kernel']} of {case} in tiles {report['tile']}"
        if report["shared"] > SHARED_LIMIT[case.arch]:
            found.append(f"{name}: {report['shared']} bytes of shared memory, of {SHARED_LIMIT[case.arch]}")
        # At fewer than 255 registers ptxas may spill a pair by choice, so that more blocks run at a time.
        by_choice = 8 if report["registers"] < 255 else 0
        if report["spills"] > max(case.spills_allowed, by_choice):
            found.append(f"{name}: {report['spills']} bytes of registers spilled")
        if report["serial"]:
            found.append(f"{name}: products one by one")
        if report["early"]:
            found.append(f"{name}: a tile's room is given back with loads from it under way")
        if report["flipped"]:
            found.append(f"{name}: the sign of products flipped, which ptxas gets wrong")
    return found


def check(cases: list[Compilation]) -> None:
    reports = compiled(cases)
    assert {report["case"] for report in reports} == set(cases)
    found = faults(reports)
    assert not found, f"{len(found)} of {len(reports)} kernels:\n" + "\n".join(found)


MANY = [{"many": False}, {"many": True}]
PAIRS = pairwise(BIASES, ARCHITECTURES, HEAD_DIMS, MASKS, DTYPES, MANY, base=Compilation())


@pytest.mark.parametrize("part", range(6))
def test_kernels_fit_every_architecture(part: int) -> None:
    check(PAIRS[part::6])


# With a scale by which factors can be divided without loss, or so many columns that queries are split instead.
TEAMS = pairwise(
    [{"bias": "none", "dtype": torch.bfloat16}, {"bias": "alibi", "dtype": torch.float16},
     {"bias": "factored", "rank": 16, "scale": 0.125, "dtype": torch.bfloat16},
     {"bias": "factored", "rank": 96, "scale": 0.125, "dtype": torch.bfloat16},
     {"bias": "factored+alibi", "rank": 16, "scale": 1.0, "dtype": torch.float16}],
    [{"c": c} for c in (16, 40, 64, 128)],
    [{"mask": "none"}, {"mask": "causal"}],
    base=Compilation(teams=True),
) + pairwise(
    [{"bias": "factored", "rank": rank, "scale": 0.3, "c": c} for rank, c in ((96, 32), (128, 64))],
    [{"mask": "none"}, {"mask": "causal"}],
    base=Compilation(teams=True, dtype=torch.bfloat16),
)  # fmt: skip
# With a last tile of all keys, and of fewer, in short rows and in long ones.
SHARED = [
    Compilation("dense", c=c, n_k=n_k, dtype=dtype, teams=True, broadcast="batch", batch=(8,))
    for c, n_k, dtype in (
        (16, 64, torch.bfloat16), (64, 64, torch.float16), (128, 64, torch.bfloat16),
        (32, 65, torch.bfloat16), (64, 80, torch.float16), (128, 96, torch.bfloat16),
        (32, 1090, torch.bfloat16), (64, 1152, torch.bfloat16),
    )
] + [  # and factors that are multiplied out
    Compilation("factored", rank=rank, c=32, n_k=65, dtype=dtype, teams=True, broadcast="batch", batch=(8,))
    for rank, dtype in ((96, torch.bfloat16), (70, torch.float16))
]  # fmt: skip


def test_teams_fit_hopper() -> None:
    """Started products stay under way, too: a use of their registers in the wrong place would cost a third."""
    if triton_version() < (3, 6):
        pytest.skip("Gluon's language for Hopper is complete from triton 3.6 on")
    reports = compiled(TEAMS + SHARED)
    found = faults(reports)
    assert not found, f"{len(found)} of {len(reports)} kernels:\n" + "\n".join(found)
    served = {(report["case"], report["kernel"]) for report in reports}
    assert {case for case, kernel in served if kernel == "expansion_kernel"} == set(SHARED[-2:])
    assert {case for case, kernel in served if kernel == "forward_teams_kernel"} == {*TEAMS, *SHARED}
    assert {case for case, kernel in served if kernel == "values_teams_kernel"} == {
        case for case in SHARED if case.c <= 64
    }
    for kernel in ("queries_teams_kernel", "keys_teams_kernel"):  # those that no power of two is the scale of are not
        assert len([case for case, name in served if name == kernel]) > len(TEAMS) / 2


def test_spills_and_errors_are_seen() -> None:
    case = Compilation(arch=89, dtype=torch.bfloat16, bias="dense", c=128)
    same = {"case": case, "kernel": "kernel", "tile": [64, 64]}
    found = faults(
        [
            same | {"shared": 101377, "registers": 9, "spills": 0, "serial": False, "flipped": False, "early": False},
            same | {"shared": 101376, "registers": 255, "spills": 8, "serial": True, "flipped": True, "early": True},
            {"case": case, "error": "CompilationError: at 1:1"},
        ]
    )
    assert len(found) == 6


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("c", [16, 32, 64, 128, 256])
def test_kernels_fit_in_the_full_product(arch: int, dtype: str, c: int) -> None:
    cases = [
        Compilation(arch=arch, dtype=getattr(torch, dtype), c=c, **bias | mask | lengths | many)
        for bias, mask, lengths, many in product(BIASES + MORE_BIASES, MASKS, LENGTHS, MANY)
    ]
    check(cases)
