"""Kernels of a first call that are compiled beside each other."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from calls import CALLS, tensors
from cases import Case, build
from standins import StandIn, tensor_at
from torch import Tensor

from flashbias import ALiBi, biased_attention, plan, reference
from flashbias.kernels import ahead, call, columns, compiled, known, replay


class Compiled(StandIn):
    """Of a kernel that adds to three numbers that it writes twice those that it reads."""

    def __getitem__(self, grid: Any) -> Callable[[Tensor | int, Tensor | int], None]:
        return self._add

    def _add(self, read: Tensor | int, write: Tensor | int) -> None:
        tensor_at(write, (3,)).add_(2 * tensor_at(read, (3,)))


class Kernel:
    """Stands in for a kernel, and a compiler that fails where it is told to."""

    arg_names = ("read", "write")
    cache_key = ""

    def __init__(self, compile: Callable[[], Any] = lambda: None) -> None:
        self.known: dict[Hashable, compiled.Known] = {}
        self.compile = compile
        self.compiled: list[str] = []  # the threads that did

    def warmup(self, *, grid: Any, read: Tensor, write: Tensor, **options: Any) -> Compiled:
        if not self.compiled:
            self.compile()
            self.compiled.append(threading.current_thread().name)
        return Compiled()

    def __getitem__(self, grid: Any) -> Callable[..., Compiled]:
        def launch(read: Tensor, write: Tensor, **options: Any) -> Compiled:
            kernel = self.warmup(grid=grid, read=read, write=write)
            kernel[grid](read, write)
            return kernel

        return launch

    def quadrupled(self, x: Tensor) -> Tensor:
        """A launch in a pass, and what torch does around it."""
        write = replay.room(x, x.shape, zeros=True)
        arguments = {"read": replay.done(Tensor.contiguous, x), "write": write}
        compiled.launch(self, (1, 1), arguments, dict, self.known, compiled.kinds(self, arguments))
        return replay.done(torch.mul, write, 2)


def run(first: Kernel, second: Kernel, after: Callable[..., Any] | None = None) -> Tensor:
    """A pass of two kernels, which is right."""
    x = torch.randn(3)
    (made,) = replay.repeated("pass", [x], lambda: [second.quadrupled(first.quadrupled(x))], after)
    assert torch.allclose(made, 16 * x)
    return made


@pytest.fixture
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "workers", lambda device: 4)


@pytest.mark.usefixtures("_threads")
def test_kernels_of_a_pass_and_of_the_next_one_are_compiled_beside_each_other() -> None:
    together = threading.Barrier(3)  # that none leaves before all have come
    kernels = [Kernel(lambda: together.wait(60)) for _ in range(3)]
    run(*kernels[:2], after=kernels[2].quadrupled)
    main = threading.current_thread().name
    assert [len(kernel.compiled) for kernel in kernels] == [1, 1, 1]
    assert all(main not in kernel.compiled for kernel in kernels)
    assert len(kernels[2].known) == 1  # for when it is launched


@pytest.mark.usefixtures("_threads")
def test_threads_take_long_turns_while_kernels_are_compiled() -> None:
    before, turns = sys.getswitchinterval(), []
    run(Kernel(lambda: turns.append(sys.getswitchinterval())), Kernel())
    assert turns == [pytest.approx(ahead.TURN)]
    assert sys.getswitchinterval() == before


@pytest.mark.usefixtures("_threads")
def test_of_a_survey_nothing_stays_in_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Kernel(), Kernel()]
    run(*kernels, after=Kernel().quadrupled)
    surveyed = list(replay._passes.values())
    run(*kernels)  # once more
    call.forget()
    monkeypatch.setattr(ahead, "workers", lambda device: 1)
    run(Kernel(), Kernel())
    for made, plain in zip(surveyed, replay._passes.values(), strict=True):
        assert made is not None
        assert plain is not None
        assert (made.rooms, made.results, len(made.steps)) == (plain.rooms, plain.results, len(plain.steps))


@pytest.mark.usefixtures("_threads")
def test_a_pass_whose_kernels_are_known_is_not_surveyed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Kernel(), Kernel()]
    run(*kernels)
    call.forget()
    monkeypatch.setattr(ahead, "compile_missing", None)
    run(*kernels, after=Kernel().quadrupled)


@pytest.mark.usefixtures("_threads")
def test_what_fails_comes_out_of_the_launch_alone() -> None:
    def fail() -> None:
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction") as caught:
        run(Kernel(), Kernel(fail))
    assert caught.value.__context__ is None
    assert replay.recorder() is None
    run(Kernel(), Kernel(), after=Kernel(fail).quadrupled)
    run(Kernel(), Kernel(), after=lambda made: fail())


def test_without_threads_each_kernel_is_compiled_where_it_is_launched() -> None:
    kernels = [Kernel(), Kernel()]
    run(*kernels)  # on a CPU
    assert [kernel.compiled for kernel in kernels] == [[threading.current_thread().name]] * 2


CASES = [
    Case("factored+alibi", "causal", rank=5),
    Case("factored", "none", rank=16, dtype=torch.float16, broadcast="missing"),
    Case("factored_fp32", "lengths", rank=5, dtype=torch.float16, heads=4, kv_heads=2),
    Case("distance", "segments", layout="expanded"),
    Case("dense_row", "allowed", broadcast="heads", layout="transposed"),
    Case("alibi_positions", "causal_tensor&segments", layout="strided"),
    Case("table", "causal_tensor"),
    Case("factored", rank=40, dtype=torch.float16, broadcast="batch"),  # multiplied out
]


def described(value: Any) -> Any:
    """A tensor descriptor as the tensor and the tile that it describes."""
    return (value.base, str(value.block_shape)) if hasattr(value, "block_shape") else value


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, _threads: None) -> dict[bool, set[Any]]:
    """What is surveyed, and what is not but made: kernels, and what their code depends on."""
    seen: dict[bool, set[Any]] = {True: set(), False: set()}
    launch = compiled.launch

    def note(kernel: Any, grid: Any, arguments: dict[str, Any], constants: Any, *known: Any) -> None:
        given = {name: described(value) for name, value in (arguments | constants()).items()}
        seen[ahead.is_surveying()].add((kernel.__name__, compiled.kinds(kernel, given)))
        launch(kernel, grid, arguments, constants, *known)

    monkeypatch.setattr(compiled, "launch", note)
    for module in (columns, known):
        monkeypatch.setattr(module, "launch", note)
    for module in (call, columns, known):  # where other calls were made before
        monkeypatch.setattr(module, "_COMPILED", {})
    call.forget()
    monkeypatch.setattr(ahead.Survey, "compile", lambda *kernel: None)
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    monkeypatch.setattr(plan, "expands", lambda query, n_k, *factors: factors[0].shape[-1] >= plan.EXPANDED_RANK)
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_forward_pass_finds_the_kernels_of_the_backward_pass_too(
    case: Case, device: str, launches: dict[bool, set[Any]]
) -> None:
    inputs = build(replace(case, n_q=20, n_k=20), device)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    query, key, value = (leaves[name] for name in ("query", "key", "value"))
    out = biased_attention(query, key, value, inputs.make_bias(leaves), mask=inputs.mask)
    found = launches[True].copy()
    out.backward(torch.randn_like(out))
    assert launches[False]
    assert found == launches[False]


@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
def test_what_is_surveyed_is_what_is_launched(name: str, device: str, launches: dict[bool, set[Any]]) -> None:
    t = tensors(device)
    biased_attention(**{key: t[key] for key in ("query", "key", "value")} | CALLS[name](t))
    assert launches[False]
    assert launches[True] == launches[False]


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="kernels are compiled one by one")
def test_a_first_call_compiles_every_kernel_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At a head dim that no other test has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "workers", lambda device: 4)
    made: Counter[str] = Counter()

    def count(*, src: Any, cache_hit: bool, **others: Any) -> None:
        assert not cache_hit
        made[src.name] += 1

    monkeypatch.setattr(triton.knobs.compilation, "listener", count)
    given = [torch.randn(2, 2, 70, 19, device="cuda", requires_grad=True) for _ in range(3)]
    bias = ALiBi(torch.rand(2, device="cuda"))
    out = biased_attention(*given, bias, is_causal=True)
    first = made.copy()
    assert len(first) >= 3
    grad_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, given, grad_out)
    assert made == first == Counter(dict.fromkeys(first, 1))
    truth, _ = reference(*given, bias, is_causal=True)
    torch.testing.assert_close(out.double(), truth.double(), atol=1e-5, rtol=1e-5)
    for gradient, expected in zip(gradients, torch.autograd.grad(truth, given, grad_out.to(truth.dtype)), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
