"""Passes that are made again, and those that must not be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from calls import CALLS, run, tensors
from torch import Tensor

from flashbias import ALiBi, DenseBias, biased_attention
from flashbias.kernels import call, replay
from flashbias.kernels.terms import Block


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")


def passes() -> list[bool]:
    """Of the passes that were made, whether they can be made again."""
    return [made is not None for made in replay._passes.values()]


AGAIN = ("plain", "dtype", "causal", "lengths", "slopes", "dense", "row", "heads swapped")


@pytest.mark.parametrize("name", AGAIN)
def test_a_pass_that_is_made_again_gives_the_same_bits(name: str, device: str) -> None:
    first, second = tensors(device), tensors(device)
    anew = run(CALLS[name](second), second, biased_attention)
    call.forget()
    run(CALLS[name](first), first, biased_attention)
    assert passes() == [True, True]
    again = run(CALLS[name](second), second, biased_attention)
    assert len(passes()) == 2
    for result, truth in zip(again, anew, strict=True):
        assert torch.equal(result, truth)


@pytest.mark.parametrize("name", ["half", "columns first", "factors"])
def test_what_torch_copies_is_copied_each_time(name: str, device: str) -> None:
    """Rows of 40 bytes, and columns apart, are copied; factors that are the inputs could be anything later."""
    t = tensors(device)
    run(CALLS[name](t), t, biased_attention)
    assert passes() == [False, False]


def test_gradients_of_slopes_and_outputs_of_other_calls(device: str) -> None:
    t = tensors(device)
    slopes = t["slopes"].requires_grad_()
    results = []
    for _ in range(2):
        out = biased_attention(t["query"], t["key"], t["value"], ALiBi(slopes))
        results.append((out, *torch.autograd.grad(out.sum(), [slopes])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].data_ptr() != results[1][0].data_ptr()


def test_which_gradients_are_wanted_is_another_pass(device: str) -> None:
    t = tensors(device)
    for wanted in (["query"], ["query", "values"], ["values"], ["key", "value"]):
        leaves = {name: t[name].detach().requires_grad_(name in wanted) for name in ("query", "key", "value", "values")}
        out = biased_attention(leaves["query"], leaves["key"], leaves["value"], DenseBias(leaves["values"]))
        out.sum().backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == wanted
    assert len(passes()) == 1 + 4


def test_what_is_kept_holds_no_tensors(device: str) -> None:
    t = tensors(device)
    held = [weakref.ref(t[name]) for name in ("query", "values")]
    out = biased_attention(t["query"], t["key"], t["value"], DenseBias(t["values"]))
    held.append(weakref.ref(out))
    assert passes() == [True]
    del t, out
    gc.collect()
    assert not any(reference() for reference in held)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(replay, "PASSES", 3)
    for length in range(1, 9):
        biased_attention(*torch.randn(3, 2, length, 16, device=device))
        assert len(passes()) <= 3


def doubled(x: Tensor, made: Callable[[Tensor], Tensor], seen: list[Any]) -> Callable[[], Sequence[Tensor]]:
    """A pass whose kernel adds what it reads to what it writes; what it reads is made of its input."""

    def kernel(read: Block, write: Tensor) -> None:
        seen.append(read)
        write += 2 * read.ptr

    def make() -> list[Tensor]:
        out = replay.room(x, x.shape, zeros=True)
        arguments = [Block(made(x), 1, 2, 3, 4), out]
        kernel(*arguments)
        replay.note(kernel, arguments)
        return [out]

    return make


def test_inputs_rooms_and_blocks_are_exchanged() -> None:
    seen: list[Any] = []
    results = []
    for x in torch.arange(6.0).view(2, 3):
        x = x.clone()
        (result,) = replay.repeated("pass", [x, None], doubled(x, lambda x: x, seen))
        assert torch.equal(result, 2 * x)
        results.append(result)
    assert passes() == [True]
    assert isinstance(seen[1], Block)
    assert seen[1].stride == seen[0].stride
    assert torch.equal(results[0], 2 * torch.arange(3.0))


@pytest.mark.parametrize("made", [torch.clone, lambda x: x.view(3, 1)[1:, 0]], ids=["copy", "part"])
def test_a_tensor_of_unknown_origin(made: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(3.0)
    replay.repeated("pass", [x], lambda: [doubled(made(x), lambda x: x, [])()[0]])
    assert passes() == [False]


def test_inputs_that_are_one_tensor_now_may_be_two_later() -> None:
    x = torch.arange(3.0)
    replay.repeated("pass", [x, x], doubled(x, lambda x: x, []))
    assert passes() == [False]


def test_a_pass_without_launches_and_one_that_fails(device: str) -> None:
    x = torch.ones(3)
    replay.repeated("pass", [x], lambda: [x + 1])
    assert passes() == [False]

    def fail() -> list[Tensor]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        replay.repeated("another", [x], fail)
    assert len(passes()) == 1
    out = replay.room(x, (3,))
    assert out.shape == (3,)
    assert passes() == [False]
