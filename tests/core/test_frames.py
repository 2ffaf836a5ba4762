"""What is kept from one call for the next, and that it confuses none."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calls import CALLS, HEADS, C, run, tensors
from standins import StandIn

from flashbias import ALiBi, DenseBias, FactoredBias, biased_attention, reference
from flashbias.kernels import call, compiled
from flashbias.kernels.terms import Block
from flashbias.operands import Operands


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")


def test_calls_that_differ_in_one_thing(device: str) -> None:
    """One after the other, and again in the other order with other tensors, when all of them are known."""
    for order in (list(CALLS), list(reversed(CALLS))):
        t = tensors(device)
        for name in order:
            changed = CALLS[name](t)
            tolerance = 2e-2 if name == "dtype" else 1e-3
            truths = run(changed, t, reference)
            for result, truth in zip(run(changed, t, biased_attention), truths, strict=True):
                torch.testing.assert_close(result.double(), truth.double(), rtol=tolerance, atol=tolerance, msg=name)


def test_what_is_kept_holds_no_tensors(device: str) -> None:
    call.forget()
    t = tensors(device)
    held = [weakref.ref(tensor) for tensor in t.values()]
    bias = ALiBi(t["slopes"]) + DenseBias(t["values"]) + FactoredBias(t["query"][0], t["key"][0])
    out = biased_attention(t["query"], t["key"], t["value"], bias)
    held.append(weakref.ref(out))
    assert call._frame.cache_info().currsize == 1
    del t, bias, out
    gc.collect()
    assert not any(reference() for reference in held)


def test_what_is_kept_is_bounded() -> None:
    assert call._frame.cache_info().maxsize == call.FRAMES


def test_lengths_share_kernels(device: str) -> None:
    """What is compiled for one serves another, unless triton would compile it anew."""

    def known(length: int, dtype: torch.dtype = torch.float32) -> dict[Any, Any]:
        q, k, v = torch.zeros(3, 2, HEADS, length, C, device=device, dtype=dtype)
        return call.prepare(q, k, v, Operands(), 1.0).frame.compiled

    assert known(20) is known(23) is known(32)
    assert known(20) is not known(20, torch.float16)


def test_a_length_is_found_once(device: str) -> None:
    t = tensors(device)
    call.forget()
    for _ in range(3):
        biased_attention(t["query"], t["key"], t["value"])
    assert call._frame.cache_info().misses == 1


class Kernel:
    """Stands in for a kernel that triton compiles: notes how it was launched."""

    arg_names = ("x", "n", "SIZE")

    def __init__(self) -> None:
        self.searched: list[dict[str, Any]] = []
        self.known: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., StandIn]:
        kernel = self

        class Compiled(StandIn):
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *arguments: kernel.known.append((grid, *arguments))

        def search(**arguments: Any) -> StandIn:
            self.searched.append(arguments)
            return Compiled()

        return search


def test_a_known_kernel_is_launched_by_position() -> None:
    kernel, known = Kernel(), {}
    for n in (5, 6):
        arguments = {"n": n, "x": "a tensor"}
        compiled.launch(kernel, (n, 2), arguments, lambda: {"SIZE": 16, "num_warps": 4}, known, "key")
    assert kernel.searched == [{"n": 5, "x": "a tensor", "SIZE": 16, "num_warps": 4, "enable_fp_fusion": True}]
    assert kernel.known == [((6, 2, 1), "a tensor", 6, 16)]


@pytest.mark.parametrize("seed", [0, 1])
def test_kernels_that_are_known_are_those_that_triton_would_take(seed: int) -> None:
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, here / "specialization.py", str(seed), "150"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["wrong"]
    assert found["again"] > found["launches"] / 5


def test_another_kind_of_argument_is_another_key() -> None:
    x = torch.zeros(9)
    block = Block(x, 1, 2, 3, 4)
    different = [
        x, x.double(), x[1:], None, 1, 16, 17, 2**31 + 1, 1.5, (x, x), (x, None), block, Block(x[1:], *block.stride),
        Block(x, 1, 2, 3, 16),
    ]  # fmt: skip
    assert len({compiled.kind(argument) for argument in different}) == len(different)
    assert compiled.kind(x) == compiled.kind(x[4:])
    assert compiled.kind(17) == compiled.kind(23)
    assert compiled.kind(Block(x, 1, 2, 3, 5)) == compiled.kind(block)


class Specialized:
    """Stands in for a kernel that is specialized by one of its arguments."""

    params = (SimpleNamespace(name="n", do_not_specialize=True), SimpleNamespace(name="row", do_not_specialize=False))


def test_by_what_a_kernel_is_specialized_is_part_of_a_key() -> None:
    kinds = partial(compiled.kinds, Specialized())
    base = kinds({"n": 17, "row": 17, "N": 17})
    assert kinds({"n": 16, "row": 23, "N": 17}) == base
    assert kinds({"n": 2**31, "row": 17, "N": 17}) != base
    assert kinds({"n": 17, "row": 16, "N": 17}) != base
    assert kinds({"n": 17, "row": 17, "N": 23}) != base
