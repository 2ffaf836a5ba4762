"""No kernel reads or writes outside of the tensors that it is given: looked after in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from cases import Case, check, ids

from flashbias import plan
from flashbias.tiles import parse

CASES = [
    Case(bias="dense", dtype=torch.float32, c=48, heads=1, batch=(1,)),
    Case(bias="factored", rank=24, dtype=torch.float32),
    Case(bias="factored_fp32", rank=96, mask="lengths", dtype=torch.float16, c=64),
    Case(bias="factored+alibi_symmetric+dense", mask="segments&lengths&allowed", n_q=17, n_k=70, c_v=40,
         broadcast="last", layout="expanded", dtype=torch.float16),
    Case(bias="distance+dense_row", mask="causal_tensor&segments", n_q=65, n_k=17, c=24, broadcast="first",
         layout="strided"),
    Case(bias="alibi_positions", mask="allowed_row", n_q=1, n_k=40, dtype=torch.float16),
    Case(bias="alibi", mask="causal&lengths", batch=(2, 3), n_q=15, n_k=15, layout="transposed"),
    Case(bias="dense+dense", mask="causal_early", n_q=40, n_k=1, kv_heads=1, broadcast="heads"),
    Case(bias="table+table", mask="causal_tensor", n_q=140, n_k=70, heads=1, broadcast="batch", dtype=torch.float16),
    Case(bias="table_long", n_q=17, n_k=70, broadcast="bare"),
    Case(bias="table_single", mask="lengths", n_q=1, n_k=40),
]  # fmt: skip


def spans(value: Any) -> Iterator[tuple[int, int]]:
    """First and last address of every tensor in an argument of a kernel."""
    if isinstance(value, tuple):
        for part in value:
            yield from spans(part)
    elif hasattr(value, "block_shape"):
        yield from spans(value.base)
    elif isinstance(value, torch.Tensor) and value.numel() > 0:
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        yield value.data_ptr(), value.data_ptr() + last * value.element_size()


@pytest.fixture(autouse=True)
def _fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """An access outside raises `IndexError` within the interpreter."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    inside: list[tuple[int, int]] = []
    begin = interpreter.GridExecutor._init_args_hst

    def note(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = begin(self, args, kwargs)
        inside[:] = [*spans(tuple(args)), *spans(tuple(kwargs.values()))]
        return args, kwargs

    def guarded(name: str, position: int) -> Any:
        original = getattr(interpreter.InterpreterBuilder, name)

        def access(self: Any, *args: Any, **kwargs: Any) -> Any:
            pointers, mask = args[0].data, args[position].data
            addresses = pointers[numpy.broadcast_to(mask, pointers.shape).astype(bool)].astype(numpy.int64)
            fine = numpy.zeros(addresses.shape, dtype=bool)
            for first, last in inside:
                fine |= (first <= addresses) & (addresses <= last)
            if not fine.all():
                raise IndexError(f"{name}: {(~fine).sum()} of {fine.size} addresses outside")
            return original(self, *args, **kwargs)

        return access

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", note)
    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, guarded(name, position))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("tile", ["16x16/4/1", "64x32/4/1"])
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_kernels_stay_inside(case: Case, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    monkeypatch.setattr(plan, "tiles", lambda *args: parse(tile))
    check(case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_stray_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import InterpreterError

    from flashbias.kernels import launch

    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    prepare = launch.prepare

    def one_too_many(*args: Any, **kwargs: Any) -> launch.Call:
        call = prepare(*args, **kwargs)
        sizes = call.frame.sizes | {"n_k": call.frame.sizes["n_k"] + 1}
        return replace(call, frame=replace(call.frame, sizes=sizes))

    monkeypatch.setattr(launch, "prepare", one_too_many)
    with pytest.raises(InterpreterError, match="outside"):
        check(Case(n_k=33, batch=(1,), heads=1))
