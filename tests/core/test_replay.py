"""Passes that are made again, and those that must not be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import CALLS, HEADS, N, run, tensors
from cases import Case, build
from standins import tensor_at, with_tensors
from torch import Tensor

from flashbias import ALiBi, DenseBias, FactoredBias, KeyPadding, SpatialDistance, biased_attention, reference
from flashbias.errors import DeviceError, ShapeError
from flashbias.kernels import call, replay
from flashbias.kernels.passes import Address
from flashbias.kernels.terms import Block
from flashbias.terms import Linear, Problem


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")


@pytest.fixture(params=["tensors", "addresses"])
def _arguments(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels of passes that are made again are given: the interpreter's take addresses too, as compiled ones."""
    if request.param == "tensors":
        yield
        return
    if device != "cpu":
        pytest.skip("compiled kernels are given addresses always")
    note = replay.note

    def note_addresses(run: Callable[..., Any], arguments: list[Any], *, takes_addresses: bool) -> None:
        def find_and_run(*given: Any) -> None:
            pairs = zip(given, arguments, strict=True)
            seen.append(any(isinstance(like, Tensor) and isinstance(value, int) for value, like in pairs))
            run(*map(with_tensors, given, arguments))

        note(find_and_run, arguments, takes_addresses=True)

    seen: list[bool] = []
    monkeypatch.setattr(replay, "note", note_addresses)
    yield
    assert all(seen)
    assert seen


def passes() -> list[bool]:
    """Of the passes that were made, whether they can be made again."""
    return [made is not None for made in replay._passes.values()]


AGAIN = ("plain", "dtype", "lengths", "dense", "heads swapped")


@pytest.mark.usefixtures("_arguments")
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


@pytest.mark.usefixtures("_arguments")
@pytest.mark.parametrize("name", ["factors", "narrow factors"])
def test_factors_that_are_inputs_now_may_be_others_later(name: str, device: str) -> None:
    t, others = tensors(device), tensors(device)
    known = [run(CALLS[name](source), t, biased_attention) for source in (t, others, t, others)]
    assert passes() == [True] * 4
    for source, results in zip((t, others, t, others), known, strict=True):
        call.forget()
        for result, truth in zip(results, run(CALLS[name](source), t, biased_attention), strict=True):
            assert torch.equal(result, truth)


def test_a_part_of_an_input_that_begins_where_another_does(device: str) -> None:
    """Columns of a factor that kernels take by themselves are also the keys; next time they are not."""
    wide, others = (torch.randn(2, 20, 128, device=device).half() for _ in range(2))
    q_factor = torch.randn(2, 20, 128, device=device).half().requires_grad_()
    query, value = (torch.randn(2, 20, 64, device=device).half() for _ in range(2))

    def gradient(key: Tensor) -> Tensor:
        out = biased_attention(query, key, value, FactoredBias(q_factor, wide), scale=0.125)
        (made,) = torch.autograd.grad(out.float().square().sum(), q_factor)
        return made

    wanted = gradient(others[..., 64:])
    call.forget()
    gradient(wide[..., 64:])
    assert torch.equal(gradient(others[..., 64:]), wanted)


CASES = [
    Case("factored+alibi", "causal", rank=5),
    Case("factored", "none", rank=16, dtype=torch.float16, broadcast="missing"),
    Case("factored", "none", rank=100, dtype=torch.float16),
    Case("factored_fp32", "lengths", rank=5, dtype=torch.float16, heads=4, kv_heads=2),
    Case("distance", "segments", layout="expanded"),
    Case("dense_row", "allowed", broadcast="heads", layout="transposed"),
    Case("alibi_positions", "causal_tensor&segments", layout="strided"),
]


@pytest.mark.usefixtures("_arguments")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_torch_does_in_a_pass_is_done_again(case: Case, device: str) -> None:
    """All gradients: sums of rows and of what was broadcast, columns joined, copies."""
    case = replace(case, n_q=20, n_k=20)
    different = replace(case, seed=1)
    anew = gradients(different, device)
    call.forget()
    gradients(case, device)
    assert passes() == [True, True]
    again = gradients(different, device)
    assert len(passes()) == 2
    assert again.keys() == anew.keys()
    for name, gradient in again.items():
        assert torch.equal(gradient, anew[name]), name


def gradients(case: Case, device: str) -> dict[str, Tensor]:
    """Output and all gradients."""
    inputs = build(case, device)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    query, key, value = (leaves[name] for name in ("query", "key", "value"))
    out = biased_attention(query, key, value, inputs.make_bias(leaves), mask=inputs.mask)
    out.float().square().sum().backward()
    return {"out": out} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def test_which_gradients_are_wanted_is_another_pass(device: str) -> None:
    t = tensors(device)
    for wanted in (["query"], ["query", "values"], ["values"], ["key", "value"]):
        leaves = {name: t[name].detach().requires_grad_(name in wanted) for name in ("query", "key", "value", "values")}
        out = biased_attention(leaves["query"], leaves["key"], leaves["value"], DenseBias(leaves["values"]))
        out.sum().backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == wanted
    assert len(passes()) == 1 + 4


@torch.no_grad()
def test_calls_without_gradients_are_passes_as_a_whole(device: str) -> None:
    """All calls, then with other tensors, then each of these as the first of its kind."""
    first, second = tensors(device), tensors(device)

    def outputs(t: dict[str, Tensor], name: str) -> Tensor:
        given = {key: t[key] for key in ("query", "key", "value")} | CALLS[name](t)
        return biased_attention(**given)

    for name in CALLS:
        outputs(first, name)
    number = len(passes())
    assert number >= len(CALLS) - 1  # those with lengths differ in what these hold alone
    again = {name: outputs(second, name) for name in CALLS}
    assert len(passes()) == number
    for name, out in again.items():
        call.forget()
        assert torch.equal(out, outputs(second, name)), name


@pytest.mark.usefixtures("_arguments")
@torch.no_grad()
def test_points_and_weights_are_those_of_each_call(device: str) -> None:
    """One tensor on both sides or two, at one place in memory or at two, and what they hold may change."""
    t = tensors(device)
    given = [t[name] for name in ("query", "key", "value")]

    def check(x_q: Tensor, x_k: Tensor, weight: Tensor, number: int) -> None:
        bias = SpatialDistance(x_q, x_k, weight)
        out, truth = biased_attention(*given, bias), reference(*given, bias)[0]
        torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-4)
        assert passes() == [True] * number

    x, y = torch.randn(2, 2, N, 3, device=device).unbind()
    weight = torch.rand(2, HEADS, N, device=device)
    check(x, x, weight, 1)
    check(x, x.view_as(x), weight, 1)
    check(y.view_as(y), y, weight + 1, 1)
    x.add_(2 * torch.randn_like(x))
    weight.mul_(-0.1)
    check(x, x, weight, 1)
    check(x, y, weight, 2)
    check(y, x, weight, 2)
    check(y, y, weight, 2)
    replay.forget()
    check(x, x.view_as(x), weight, 1)  # two objects at one place are the first of their kind
    check(y, y, weight, 1)
    check(x, x[:1].expand_as(x), weight, 2)  # they begin at one place, but do not lie alike
    check(x[:1].expand_as(x), x, weight, 3)
    weight = weight.as_strided((2, HEADS, N), (0, 0, 1))
    check(x, x, weight, 4)


@torch.no_grad()
def test_distances_of_some_positions_are_made_by_torch_in_every_call(device: str) -> None:
    for _ in range(2):
        t = tensors(device)
        given = [t[name] for name in ("query", "key", "value")]
        x = torch.randn(2, N, 3, device=device)
        options = {
            "bias": SpatialDistance(x, x, t["slopes"][:, None]),
            "mask": KeyPadding(torch.tensor([N, 7]).to(device)),
        }
        for _ in range(2):
            out = biased_attention(*given, **options)
            torch.testing.assert_close(out.double(), reference(*given, **options)[0], rtol=1e-4, atol=1e-4)
    assert passes()[0] is False


@torch.no_grad()
def test_what_a_bias_says_is_read_in_every_call(device: str) -> None:
    t = tensors(device)
    given = [t[name] for name in ("query", "key", "value")]
    bias = ALiBi(t["slopes"])
    plain = biased_attention(*given, bias)
    bias.symmetric = True
    turned = biased_attention(*given, bias)
    assert torch.equal(turned, biased_attention(*given, ALiBi(t["slopes"], symmetric=True)))
    assert not torch.equal(turned, plain)
    bias.slopes = t["slopes"][:1]  # of all heads
    assert torch.equal(biased_attention(*given, bias)[:, 0], turned[:, 0])
    bias.slopes = t["slopes"].repeat(2)
    with pytest.raises(ShapeError, match="slopes"):
        biased_attention(*given, bias)
    bias.slopes = t["slopes"].to("meta")
    with pytest.raises(DeviceError, match="slopes"):
        biased_attention(*given, bias)


@torch.no_grad()
def test_a_bias_defined_elsewhere_is_asked_in_every_call(device: str) -> None:
    class Moving(ALiBi):
        sign = 1.0

        def terms(self, problem: Problem) -> list[Linear]:
            return [Linear(self.sign * self.slopes, None, None, False)]

    t = tensors(device)
    given = [t[name] for name in ("query", "key", "value")]
    bias = Moving(t["slopes"])
    biased_attention(*given, bias)
    bias.__class__.sign = -1.0
    assert torch.equal(biased_attention(*given, bias), biased_attention(*given, ALiBi(-t["slopes"])))


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


@pytest.fixture(params=[False, True], ids=["tensors", "addresses"])
def by_address(request: pytest.FixtureRequest) -> bool:
    """Whether kernels of passes that are made again take addresses, as compiled ones do."""
    return bool(request.param)


def doubled(x: Tensor, read: Callable[[Tensor], Tensor], seen: list[Any], by_address: bool) -> list[Tensor]:
    """A pass of two kernels: twice what they read, which is made of the input, is added to what they write."""
    made = read(x)

    def store(block: Block, write: Tensor | int) -> None:
        seen.append(block)
        tensor_at(write, made.shape, torch.float64).copy_(tensor_at(block.ptr, made.shape, made.dtype))

    def add(read: Tensor | int, write: Tensor | int) -> None:
        tensor_at(write, made.shape, made.dtype).add_(2 * tensor_at(read, made.shape, torch.float64))

    between = replay.room(x, made.shape, torch.float64)
    out = replay.room(x, made.shape, made.dtype, zeros=True)
    for kernel, arguments in ((store, [Block(made, 1, 2, 3, 4), between]), (add, [between, out])):
        kernel(*arguments)
        replay.note(kernel, arguments, takes_addresses=by_address)
    return [out]


def again(read: Callable[[Tensor], Tensor], seen: list[Any], by_address: bool) -> list[Tensor]:
    """What the pass gives, which is right, for one input and then for another."""
    results = []
    for x in torch.arange(6.0).view(2, 3).unbind():
        x = x.clone()
        (result,) = replay.repeated("pass", [x, None], lambda x=x: doubled(x, read, seen, by_address))
        assert torch.equal(result, 2 * read(x))
        results.append(result)
    return results


def test_inputs_rooms_and_blocks_are_exchanged(by_address: bool) -> None:
    seen: list[Any] = []
    first, _ = again(lambda x: x, seen, by_address)
    assert passes() == [True]
    (made,) = replay._passes.values()
    assert (len(made.rooms), len(made.shares)) == ((1, 2) if by_address else (2, 1))
    assert [isinstance(block.ptr, Tensor) for block in seen] == [True, not by_address]
    assert isinstance(seen[1], Block)
    assert seen[1].stride == seen[0].stride
    assert torch.equal(first, 2 * torch.arange(3.0))


class Descriptor:
    """As a tensor descriptor: a launch asks its tensor for the address alone."""

    def __init__(self, base: Any, rows: int) -> None:
        self.base, self.rows, self.block_shape = base, rows, [rows]

    def tensor(self) -> Tensor:
        return self.base if isinstance(self.base, Tensor) else tensor_at(self.base.data_ptr(), (self.rows,))


def test_descriptors_have_tensors_or_their_addresses(by_address: bool) -> None:
    def copy(read: Descriptor, write: Descriptor) -> None:
        seen.append(write)
        write.tensor().copy_(read.tensor() + 1)

    def twice(x: Tensor) -> list[Tensor]:
        between, out = replay.room(x, x.shape), replay.room(x, x.shape)
        for arguments in ([Descriptor(x, 3), Descriptor(between, 3)], [Descriptor(between, 3), Descriptor(out, 3)]):
            copy(*arguments)
            replay.note(copy, arguments, takes_addresses=by_address)
        return [out]

    seen: list[Descriptor] = []
    for x in (torch.arange(3.0), torch.arange(3.0, 6.0)):
        (out,) = replay.repeated("pass", [x], lambda x=x: twice(x))
        assert torch.equal(out, x + 2)
    assert passes() == [True]
    (made,) = replay._passes.values()
    assert (len(made.rooms), len(made.shares)) == ((1, 2) if by_address else (2, 1))
    assert [type(descriptor.base) for descriptor in seen] == [Tensor] * 2 + [Address if by_address else Tensor] * 2


@pytest.mark.parametrize(
    ("read", "known"),
    [
        (torch.clone, False),
        (lambda x: replay.done(torch.clone, x), True),
        (lambda x: replay.done(torch.clone, x[:2]), True),
        (lambda x: replay.done(torch.add, x[:2].view(2, 1), replay.done(torch.clone, x)), True),
        (lambda x: replay.done(torch.clone, x[1:]), False),
        (lambda x: replay.done(Tensor.contiguous, x), True),
        (lambda x: replay.done(torch.clone, replay.done(Tensor.narrow, x, 0, 1, 2)), True),
    ],
    ids=["copy", "copy that is done", "of a part", "of a copy", "of another part", "nothing", "of a part that is done"],
)
def test_what_torch_makes_is_known_where_it_is_done(
    read: Callable[[Tensor], Tensor], known: bool, by_address: bool
) -> None:
    again(read, [], by_address)
    assert passes() == [known]


def test_a_list_of_tensors_is_refused() -> None:
    with pytest.raises(TypeError):
        again(lambda x: replay.done(torch.stack, [x, x]), [], by_address=False)


def test_inputs_that_are_one_tensor_now_may_be_two_later(by_address: bool) -> None:
    x, y = torch.arange(3.0), torch.ones(3)
    for first, second in ((x, x), (x, y), (y, y), (y, x)):
        make = lambda x=first, y=second: doubled(x, lambda _: y, [], by_address)  # noqa: E731
        (result,) = replay.repeated("pass", [first, second], make)
        assert torch.equal(result, 2 * second)
    assert passes() == [True, True]


def test_inputs_of_two_dtypes_in_one_place(by_address: bool) -> None:
    for x in torch.arange(8.0).view(2, 4).unbind():
        x = x.clone()
        halves = x.view(torch.float16)
        read = lambda _, halves=halves: halves  # noqa: E731
        (result,) = replay.repeated("pass", [x, halves], lambda x=x, read=read: doubled(x, read, [], by_address))
        assert torch.equal(result, 2 * halves.float())
    assert passes() == [True]


def test_a_pass_inside_of_another_is_a_part_of_it(by_address: bool) -> None:
    for x in torch.arange(6.0).view(2, 3).unbind():
        x = x.clone()

        def make(x: Tensor = x) -> list[Tensor]:
            (inner,) = replay.repeated("inner", [x], lambda: doubled(x, lambda x: x, [], by_address))
            return doubled(inner, lambda x: x, [], by_address)

        (result,) = replay.repeated("outer", [x], make)
        assert torch.equal(result, 4 * x)
    assert passes() == [True]


def test_passes_beside_each_other_leave_torchs_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = torch.utils.deterministic
    for value in (True, False):
        monkeypatch.setattr(settings, "fill_uninitialized_memory", value)
        first, second = (replay._unfilled(nullcontext()) for _ in range(2))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not settings.fill_uninitialized_memory
        second.__exit__(None, None, None)
        assert settings.fill_uninitialized_memory == value


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
