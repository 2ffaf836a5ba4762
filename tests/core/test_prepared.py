"""Calls that share bias, mask and scale: made again at once where nothing has changed, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashbias import ALiBi, Causal, DenseBias, biased_attention, ops
from flashbias.errors import ShapeError
from flashbias.kernels import replay
from flashbias.prepared import Prepared

HEADS, N = 2, 20


@pytest.fixture(params=["triton", "auto"], autouse=True)
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: str) -> bool:
    """Whether calls are passes of kernels, which can be made again: not on a CPU."""
    monkeypatch.setenv("FLASHBIAS_BACKEND", request.param)
    replay.forget()
    return request.param == "triton" or device == "cuda"


def draw(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def inputs(device: str, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = draw(device, 3, 1, HEADS, n, 16)
    return query.clone(), key.clone(), value.clone()


def made(prepared: Prepared, own: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, bool]:
    """The output, and whether it was made past `biased_attention`."""
    calls: list[Any] = []
    attend = prepared._attend
    prepared._attend = lambda own: calls.append(own) or attend(own)  # type: ignore[method-assign, func-returns-value]
    out = prepared(*own)
    del prepared._attend  # type: ignore[method-assign]
    return out, not calls


HOW: dict[str, Callable[[str], tuple[Any, Any, float | None]]] = {
    "nothing": lambda device: (None, None, None),
    "alibi, causal": lambda device: (ALiBi(draw(device, HEADS)), Causal(), 0.3),
    "dense": lambda device: (DenseBias(draw(device, HEADS, N, N)), None, 0.5),
}


@pytest.mark.parametrize("how", HOW)
def test_the_same_bits_as_by_the_operator(how: str, known: bool, device: str) -> None:
    bias, mask, scale = HOW[how](device)
    prepared = Prepared(bias, mask, scale)
    with torch.no_grad():
        for i in range(3):
            own = tuple(x + i for x in inputs(device))
            out, at_once = made(prepared, own)
            assert torch.equal(out, biased_attention(*own, bias, mask=mask, scale=scale))
            assert at_once == (known and i > 0)


def test_a_first_call_is_made_at_once_where_the_operator_has_made_one_like_it(known: bool, device: str) -> None:
    bias, own = ALiBi(draw(device, HEADS)), inputs(device)
    with torch.no_grad():
        expected = biased_attention(*own, bias, mask=Causal(), scale=0.3)
        out, at_once = made(Prepared(bias, Causal(), 0.3), own)
        assert at_once == known
        assert torch.equal(out, expected)
        assert not made(Prepared(bias, Causal(), 0.4), own)[1]


def test_what_lies_otherwise_is_looked_at_anew(device: str) -> None:
    prepared = Prepared(ALiBi(draw(device, HEADS)), Causal(), None)
    query, key, value = inputs(device)
    others = {
        "length": inputs(device, N + 1),
        "strides": (query.mT.contiguous().mT, key, value),
        "dtype": (query.half(), key.half(), value.half()),
    }
    with torch.no_grad():
        for own in others.values():
            prepared(query, key, value)
            out, at_once = made(prepared, own)
            assert not at_once
            assert torch.equal(out, biased_attention(*own, prepared.bias, mask=Causal()))
        with pytest.raises(ShapeError):
            prepared(query, key[..., :8], value)


def test_a_call_while_another_looks_for_its_way_finds_its_own(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another thread."""
    prepared, find = Prepared(ALiBi(draw(device, HEADS)), Causal(), None), ops.known_way
    short, long = inputs(device, 8), inputs(device, 24)
    between: list[Tensor] = []

    def interrupted(parts: Any) -> Any:
        way = find(parts)
        monkeypatch.setattr(ops, "known_way", find)
        between.append(prepared(*short))
        return way

    with torch.no_grad():
        for own in (short, long) * 3:
            prepared(*own)
        monkeypatch.setattr(ops, "known_way", interrupted)
        out = prepared(*short)
        assert torch.equal(between[0], out)
        assert torch.equal(out, biased_attention(*short, prepared.bias, mask=Causal()))


def test_gradients_autocast_and_modes_are_kept(device: str) -> None:
    prepared = Prepared(ALiBi(draw(device, HEADS)), None, None)
    own = inputs(device)
    with torch.no_grad():
        prepared(*own)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            assert prepared(*own).dtype == torch.bfloat16
        with torch.device("meta"):  # a mode
            assert not made(prepared, own)[1]
    query = own[0].requires_grad_()
    (gradient,) = torch.autograd.grad(prepared(query, *own[1:]).sum(), query)
    assert gradient.abs().sum() > 0
