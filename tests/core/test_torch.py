"""How the operator lives inside torch: its registration, the compiler, export, autocast, checkpointing, CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Case, build
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flashbias import (
    ALiBi,
    Bias,
    Causal,
    DenseBias,
    FactoredBias,
    KeyPadding,
    Mask,
    RelativePositionBias,
    Segments,
    SpatialDistance,
    biased_attention,
    flash_bias_func,
    ops,
)
from flashbias.masks import Allowed, Both
from flashbias.operands import gather
from flashbias.terms import Problem, Rank

Tensors = dict[str, Tensor]

QKV = ("query", "key", "value")
# Makers that stay the same objects at every length, or the compiler would compile anew for each of them.
BIASES: dict[str, Callable[[Tensors], Bias | None]] = {
    "none": lambda t: None,
    "factored": lambda t: FactoredBias(t["q_factor"], t["k_factor"]),
    "alibi": lambda t: ALiBi(t["slopes"]),
    "symmetric": lambda t: ALiBi(t["slopes"], symmetric=True),
    "positions": lambda t: ALiBi(t["slopes"], q_positions=t["q_positions"], k_positions=t["k_positions"]),
    "distance": lambda t: SpatialDistance(t["x_q"], t["x_k"], t["weight"]),
    "dense": lambda t: DenseBias(t["values"]),
    "row": lambda t: DenseBias(t["row"]),
    "table": lambda t: RelativePositionBias(t["table"]),
    "sum": lambda t: FactoredBias(t["q_factor"], t["k_factor"]) + ALiBi(t["slopes"]) + DenseBias(t["values"]),
    "factors": lambda t: FactoredBias(t["q_factor"], t["k_factor"]) + SpatialDistance(t["x_q"], t["x_k"], t["weight"]),
}
MASKS: dict[str, Callable[[Tensors], Mask | Tensor | None]] = {
    "none": lambda t: None,
    "causal": lambda t: Causal(),
    "offset": lambda t: Causal(2),
    "offsets": lambda t: Causal(t["offsets"]),
    "lengths": lambda t: KeyPadding(t["lengths"]),
    "segments": lambda t: Segments(t["q_ids"], t["k_ids"]),
    "boolean": lambda t: t["allowed"],
    "joined": lambda t: Both(Causal(), KeyPadding(t["lengths"]), Allowed(t["allowed"])),
}
# Every bias and every mask once or more.
PAIRS = [
    ("none", "joined"), ("factored", "none"), ("alibi", "causal"), ("symmetric", "offset"), ("positions", "offsets"),
    ("distance", "lengths"), ("dense", "segments"), ("row", "boolean"), ("sum", "causal"), ("factors", "segments"),
    ("table", "none"), ("table", "offsets"),
]  # fmt: skip


@pytest.fixture(params=["cpu", "triton"])
def place(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the tensors for each backend."""
    monkeypatch.setenv("FLASHBIAS_BACKEND", request.param)
    return device if request.param == "triton" else "cpu"


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(n_q: int, n_k: int, device: str, *, batch: int = 2, heads: int = 2, dtype: Any = torch.float32) -> Tensors:
    """Tensors for all of `BIASES` and `MASKS`."""
    floating = {
        "query": (batch, heads, n_q, 16), "key": (batch, heads, n_k, 16), "value": (batch, heads, n_k, 16),
        "q_factor": (batch, 1, n_q, 3), "k_factor": (heads, n_k, 3), "slopes": (heads,), "x_q": (batch, n_q, 3),
        "x_k": (batch, n_k, 3), "weight": (batch, heads, 1), "values": (heads, n_q, n_k), "row": (batch, 1, 1, n_k),
        "table": (heads, 11),
    }  # fmt: skip
    tensors = {
        name: torch.randn(shape, device=device, dtype=dtype if name in QKV else torch.float32)
        for name, shape in floating.items()
    }
    q_positions = torch.randint(n_k, (batch, n_q), device=device)
    return tensors | {
        "q_positions": q_positions, "k_positions": torch.arange(n_k, device=device).repeat(batch, 1),
        "offsets": torch.randint(n_k, (batch,), device=device),
        "lengths": torch.randint(1, n_k + 1, (batch,), device=device),
        "q_ids": torch.randint(-1, 2, (batch, n_q), device=device),
        "k_ids": torch.randint(-1, 2, (batch, n_k), device=device),
        "allowed": torch.rand(n_q, n_k, device=device) < 0.7,
    }  # fmt: skip


def run(function: Callable[..., Any], tensors: Tensors) -> list[Tensor]:
    """The outputs of a function of tensors, and the gradients of all that have one."""
    leaves = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()
    }
    outputs = function(leaves)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    torch.autograd.backward(outputs, cotangents)
    return [*outputs, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def assert_equal(results: list[Tensor], wanted: list[Tensor], **tolerance: float) -> None:
    assert len(results) == len(wanted)
    for result, other in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, other, equal_nan=True, **tolerance)


OPERATORS = [
    Case("none", "none", heads=4, kv_heads=2, layout="transposed"),
    Case("factored+alibi", "causal", rank=5, layout="strided"),
    Case("alibi_positions", "causal_tensor&segments", broadcast="heads"),
    Case("distance+dense", "lengths&allowed", broadcast="missing", poison=False),
    Case("dense_row", "causal_early", c_v=24, layout="expanded"),
    Case("table", "causal_tensor&segments", broadcast="batch"),
]


@pytest.mark.parametrize("number", range(len(OPERATORS)))
def test_opcheck(number: int, place: str) -> None:
    inputs = build(Case(**{**vars(OPERATORS[number]), "n_q": 5, "n_k": 9, "batch": (1,)}), place)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves.items()}
    query, key, value = (leaves[name] for name in QKV)
    batch = query.shape[:-3]
    operands = gather(inputs.make_bias(leaves), inputs.mask, batch, query.shape[-3], query, key)
    key, value = (tensor.expand(*batch, *tensor.shape[-3:]) for tensor in (key, value))
    operands.factor_unit = 0.5 if operands.slopes is not None else 1.0
    args = (query, key, value, *vars(operands).values(), 0.25)
    torch.library.opcheck(ops.attention, args)

    args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
    out, lse = ops.attention(*args)
    wanted = [isinstance(args[position], Tensor) for position in ops.DIFFERENTIABLE.values()]
    if number == 0:
        wanted[1] = False
    torch.library.opcheck(
        ops.attention_backward, (torch.randn_like(out), torch.randn_like(lse), out, lse, wanted, *args)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_product_of_factors_counts_as_often_as_its_unit_says(dtype: torch.dtype, place: str) -> None:
    """Forward, gradients, and where two biases of factors are merged."""
    t = make(7, 9, place, dtype=dtype)
    others = FactoredBias(t["query"].detach(), t["key"].detach())

    class Scaled(FactoredBias):
        def terms(self, problem: Problem) -> list[Rank]:
            return [Rank(2 * self.q_factor, self.k_factor, unit=0.5)]

    def attend(kind: type[FactoredBias], sums: bool) -> Callable[[Tensors], Any]:
        def run(t: Tensors) -> Any:
            bias = kind(t["q_factor"], t["k_factor"])
            whole = others + bias + bias if sums else bias
            return biased_attention(t["query"], t["key"], t["value"], whole, return_lse=True, scale=0.3)

        return run

    for sums in (False, True):
        # Powers of two do not round: but for halves of the factors, which are balanced, all is the same.
        assert_equal(run(attend(Scaled, sums), t), run(attend(FactoredBias, sums), t), rtol=1e-3, atol=1e-5)


def attend_with(make_bias: Callable[[Tensors], Any], make_mask: Callable[[Tensors], Any]) -> Callable[..., Any]:
    """Attention that makes its bias and mask itself."""

    def attend(t: Tensors) -> Any:
        return biased_attention(t["query"], t["key"], t["value"], make_bias(t), mask=make_mask(t), return_lse=True)

    return attend


LENGTHS = [(5, 9), (7, 6), (8, 8)]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("bias", "mask"), PAIRS)
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_compiles_once_for_all_lengths(made: str, bias: str, mask: str, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    inside = attend_with(BIASES[bias], MASKS[mask])

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(t: Tensors, b: Bias | None = None, m: Mask | Tensor | None = None) -> Any:
        if made == "inside":
            return inside(t)
        return biased_attention(t["query"], t["key"], t["value"], b, mask=m, return_lse=True)

    def attend(t: Tensors) -> Any:
        return compiled(t) if made == "inside" else compiled(t, BIASES[bias](t), MASKS[mask](t))

    for n_q, n_k in LENGTHS:
        tensors = make(n_q, n_k, device)
        assert_equal(run(attend, tensors), run(inside, tensors))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("compiler")
def test_compiles_is_causal_beside_a_mask(device: str) -> None:
    def attend(t: Tensors) -> Any:
        lengths = KeyPadding(t["lengths"])
        return biased_attention(t["query"], t["key"], t["value"], mask=lengths, is_causal=True, return_lse=True)

    tensors = make(5, 9, device)
    assert_equal(run(torch.compile(attend, fullgraph=True, backend="aot_eager"), tensors), run(attend, tensors))


@pytest.mark.skipif(torch.__version__ < "2.8", reason="the compiler of torch 2.7 traces no `&` of objects")
@pytest.mark.usefixtures("compiler")
def test_compiles_masks_joined_inside(device: str) -> None:
    """Of masks; the compiler cannot trace the `&` of a mask and a tensor."""
    attend = attend_with(
        BIASES["alibi"], lambda t: Causal() & KeyPadding(t["lengths"]) & Segments(t["q_ids"], t["k_ids"])
    )
    tensors = make(5, 9, device)
    assert_equal(run(torch.compile(attend, fullgraph=True, backend="aot_eager"), tensors), run(attend, tensors))


@pytest.mark.gpu  # without one it takes half a minute of a C++ compiler
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("bias", "mask"), [("sum", "joined"), ("distance", "segments")])
def test_code_of_the_compiler_gives_the_same(bias: str, mask: str, device: str) -> None:
    """Through inductor, which relies on the strides that the fake implementations promise."""
    attend = attend_with(BIASES[bias], MASKS[mask])
    compiled = torch.compile(attend, fullgraph=True)
    tensors = make(5, 9, device)
    assert_equal(run(compiled, tensors), run(attend, tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiler")
def test_compiles_inside_autocast(device: str) -> None:
    half = torch.float16

    def attend(t: Tensors) -> Any:
        with torch.autocast(device, half):
            return inside(t)

    inside = attend_with(BIASES["sum"], MASKS["causal"])
    tensors = make(5, 9, device)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, tensors), run(attend, tensors), rtol=1e-2, atol=1e-2)
    assert compiled(tensors)[0].dtype == half


@pytest.mark.parametrize(
    ("bias", "mask", "strict"),
    [("sum", "joined", False), ("distance", "segments", True), ("positions", "offsets", False), ("row", "none", True)],
)
def test_exports_for_all_lengths(bias: str, mask: str, strict: bool, device: str) -> None:
    class Attention(nn.Module):
        def forward(self, t: Tensors) -> Any:
            return attend_with(BIASES[bias], MASKS[mask])(t)

    n_q, n_k = (torch.export.Dim(name, min=2, max=4096) for name in ("n_q", "n_k"))
    tensors = make(5, 9, device)
    shapes = {
        name: {d: n_q if size == 5 else n_k for d, size in enumerate(tensor.shape) if size in (5, 9)}
        for name, tensor in tensors.items()
    }
    program = torch.export.export(Attention(), (tensors,), dynamic_shapes=(shapes,), strict=strict)
    other = make(7, 6, device)
    assert_equal(list(program.module()(other)), list(Attention()(other)))


@pytest.mark.parametrize("bias", ["none", "factored", "positions", "distance", "dense", "sum"])
def test_autocast_casts_query_key_and_value_only(bias: str, place: str) -> None:
    half = torch.float16  # the interpreter's bf16 product is wrong
    tensors = make(7, 9, place)
    tensors["weight"] *= 30  # logits that half-precision factors would get wrong
    attend = attend_with(BIASES[bias], MASKS["none"])

    def inside(t: Tensors) -> Any:
        with torch.autocast(place, half):
            return attend(t)

    def by_hand(t: Tensors) -> Any:
        return attend(t | {name: t[name].to(half) for name in QKV})

    results = run(inside, tensors)
    assert results[0].dtype == half
    assert all(result.dtype == torch.float32 for result in results[1:])
    assert_equal(results, run(by_hand, tensors), rtol=0, atol=0)


def test_backward_outside_of_autocast_is_the_same_as_inside(place: str) -> None:
    tensors = make(7, 9, place)
    attend = attend_with(BIASES["sum"], MASKS["causal"])

    def inside(t: Tensors) -> Any:
        with torch.autocast(place, torch.float16):
            return attend(t)

    outside = run(inside, tensors)
    with torch.autocast(place, torch.float16):
        assert_equal(run(attend, tensors), outside, rtol=0, atol=0)


@pytest.mark.parametrize("abreast", [False, True])
def test_results_may_be_changed_in_place(abreast: bool, place: str) -> None:
    """As torch's, in a first call and in others, also where they lie as queries that are a projection's."""
    shape = (2, 7, 3, 16) if abreast else (2, 3, 7, 16)
    query, key, value = (torch.randn(shape, device=place, requires_grad=True) for _ in range(3))
    for _ in range(3):
        out = biased_attention(*(x.transpose(1, 2) if abreast else x for x in (query, key, value)))
        before = out.detach().clone()
        out.mul_(2)
        assert torch.equal(out, 2 * before)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # backward would read it
            out.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("bias", "mask"), [("sum", "joined"), ("distance", "lengths")])
def test_checkpointing(bias: str, mask: str, use_reentrant: bool, place: str) -> None:
    attend = attend_with(BIASES[bias], MASKS[mask])

    def checkpointed(t: Tensors) -> Any:
        def function(*values: Tensor) -> Any:
            return attend(dict(zip(t, values, strict=True)))

        return checkpoint(function, *t.values(), use_reentrant=use_reentrant)

    tensors = make(7, 9, place)
    assert_equal(run(checkpointed, tensors), run(attend, tensors), rtol=0, atol=0)


@pytest.mark.parametrize(("bias", "mask"), [("sum", "joined"), ("distance", "offsets"), ("row", "segments")])
def test_deterministic_algorithms(bias: str, mask: str, place: str) -> None:
    """Runs, repeats bit for bit, and reads nothing uninitialised: the switch fills `torch.empty` with NaN."""
    attend = attend_with(BIASES[bias], MASKS[mask])
    tensors = make(17, 13, place)
    wanted = run(attend, tensors)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(attend, tensors), run(attend, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(first, second, rtol=0, atol=0)
    assert_equal(first, wanted)
    assert all(not gradient.isnan().any() for gradient in first[2:])


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard: Any, place: str) -> None:
    attend = attend_with(BIASES["sum"], MASKS["joined"])
    tensors = make(7, 9, place)
    leaves = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}
    with guard():
        results = attend(leaves)
    assert not any(result.requires_grad for result in results)
    assert_equal(list(results), [result.detach() for result in attend(leaves)], rtol=0, atol=0)


@pytest.mark.parametrize("bias", ["none", "sum", "distance"])
def test_gradients_by_torch_func(bias: str, place: str) -> None:
    tensors = make(7, 9, place)
    attend = attend_with(BIASES[bias], MASKS["joined"])
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}

    def total(leaves: Tensors) -> Tensor:
        out, lse = attend(tensors | leaves)
        return out.square().sum() + lse.sin().sum()

    wanted = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    total(wanted).backward()
    for made in (torch.func.grad(total)(leaves), torch.func.vjp(total, leaves)[1](torch.ones((), device=place))[0]):
        for name, leaf in wanted.items():
            assert torch.equal(made[name], torch.zeros_like(leaf) if leaf.grad is None else leaf.grad), name


def test_who_listens_to_torch_hears_the_operator(place: str) -> None:
    """Modes and profilers, forward and backward; where nobody listens results are the same."""

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    heard: list[str] = []
    query, key, value = torch.randn(3, 1, 2, 9, 16, device=place).requires_grad_().unbind()

    def run() -> tuple[Tensor, ...]:
        out = biased_attention(query, key, value, is_causal=True)
        return out, *torch.autograd.grad(out.sum(), (query, key, value))

    quiet = run()
    with Listener():
        seen = run()
    assert all(torch.equal(a, b) for a, b in zip(quiet, seen, strict=True))
    assert {"flashbias.attention.default", "flashbias.attention_backward.default"} <= set(heard)
    with torch.profiler.profile() as profile:
        run()
    names = {event.name for event in profile.events()}
    assert {"flashbias::attention", "flashbias::attention_backward"} <= names


def test_cotangents_of_any_strides(place: str) -> None:
    """`sum()` gives an expanded cotangent, `transpose` a strided one."""
    attend = attend_with(BIASES["sum"], MASKS["causal"])
    tensors = make(7, 9, place)

    def gradients(cotangent: Tensor, d_lse: Tensor) -> list[Tensor]:
        leaves = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}
        torch.autograd.backward(attend(leaves), (cotangent, d_lse))
        return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]

    shape = tensors["query"].shape
    one = torch.ones((), device=place)
    assert_equal(
        gradients(one.expand(shape), one.expand(shape[:-1])),
        gradients(one.expand(shape).contiguous(), one.expand(shape[:-1]).contiguous()),
    )
    cotangent, d_lse = torch.randn(*shape, device=place), torch.randn(*shape[:-1], device=place)
    assert_equal(gradients(cotangent.mT.contiguous().mT, d_lse.mT.contiguous().mT), gradients(cotangent, d_lse))


@pytest.mark.gpu
@pytest.mark.parametrize(("bias", "mask"), PAIRS)
def test_cuda_graph(bias: str, mask: str, device: str) -> None:
    """Capture a forward and backward pass, replay it on other values."""
    attend = attend_with(BIASES[bias], MASKS[mask])
    static, other = (make(200, 300, device, dtype=torch.float16) for _ in range(2))
    leaves = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in static.items()}
    with torch.no_grad():  # a graph that outlives this would tie the leaves to this stream, which capture refuses
        out, lse = attend(leaves)
    differentiated = [leaf for leaf in leaves.values() if leaf.requires_grad]
    cotangents = torch.randn_like(out), torch.zeros_like(lse)

    def step() -> tuple[Tensor | None, ...]:
        outputs = attend(leaves)
        return (*outputs, *torch.autograd.grad(outputs, differentiated, cotangents, allow_unused=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(other[name])
    graph.replay()
    results, wanted = ([result for result in results if result is not None] for results in (captured, step()))
    assert_equal(results, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, and torch sees fewer")
@pytest.mark.parametrize(("bias", "mask"), PAIRS)
def test_gpu_that_is_not_the_current_one(bias: str, mask: str) -> None:
    attend = attend_with(BIASES[bias], MASKS[mask])
    tensors = make(200, 300, "cuda:0", dtype=torch.float16)
    there = {name: tensor.to("cuda:1") for name, tensor in tensors.items()}
    assert torch.cuda.current_device() == 0
    results = run(attend, there)
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_equal([result.to("cuda:0") for result in results], run(attend, tensors))


def assert_same_at_the_end(attend: Callable[[Tensors], Any], tensors: Tensors, last: Tensors) -> None:
    """Compare the last batch rows and heads of a large call, forward and backward, with a call on these alone.

    The large tensors are not copied: there may be no room for that.
    """
    rows, heads = last["query"].shape[:2]
    results = []
    for part in (tensors, last):
        leaves = {name: part[name].detach().requires_grad_() for name in QKV}
        out, lse = attend(part | leaves)
        cotangent = torch.ones((), device=out.device, dtype=out.dtype).expand(out.shape)
        gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
        results.append([result[-rows:, -heads:].detach().clone() for result in (out, lse, *gradients)])
        del out, lse, gradients
    assert_equal(*results, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "heads"), [(70_000, 1), (1, 70_000), (300, 300)])
def test_more_than_65535_batch_heads(batch: int, heads: int, device: str) -> None:
    tensors = make(17, 19, device, batch=batch, heads=heads, dtype=torch.float16)
    last = {name: tensors[name][-1:] for name in ("k_factor", "slopes", "values")}
    last |= {name: tensors[name][-1:, -1:] for name in (*QKV, "q_factor")}
    attend = attend_with(BIASES["sum"], MASKS["causal"])
    assert_same_at_the_end(attend, tensors, last)
    # What is shared sums its gradient over tens of thousands of batch-heads.
    d_values = run(attend, tensors)[-1]
    assert d_values.shape == tensors["values"].shape
    assert d_values.isfinite().all()
    assert (d_values.tril(19 - 17) != 0).any(-1).all()


LARGE = 65_600  # times 512 x 64 is more than 2^31


@pytest.mark.gpu
@pytest.mark.parametrize(("n_q", "n_k"), [(512, 64), (64, 512)])
@pytest.mark.parametrize("bias", ["none", "dense"])
def test_offsets_past_2_to_the_31(bias: str, n_q: int, n_k: int, device: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 64 * 2**30:
        pytest.skip("needs a GPU with 64 GiB")
    shapes = {"query": (LARGE, 1, n_q, 64), "key": (LARGE, 1, n_k, 64), "value": (LARGE, 1, n_k, 64)}
    if bias == "dense":
        shapes["values"] = (LARGE, 1, n_q, n_k)
    tensors = {name: torch.randn(shape, device=device, dtype=torch.float16) for name, shape in shapes.items()}
    assert max(math.prod(shape) for shape in shapes.values()) > 2**31
    last = {name: tensor[-3:].clone() for name, tensor in tensors.items()}
    attend = attend_with(BIASES[bias], MASKS["none"])
    assert_same_at_the_end(attend, tensors, last)
    if bias == "dense":  # its gradient has as many elements
        results = []
        for part in (tensors, last):
            values = part["values"].requires_grad_()
            out, _ = attend(part)
            cotangent = torch.ones((), device=device, dtype=out.dtype).expand(out.shape)
            results.append(torch.autograd.grad(out, values, cotangent)[0][-3:].clone())
            del out
        assert_equal(results[:1], results[1:], rtol=1e-2, atol=1e-3)


def test_rows_far_apart(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tile kernels count in 32 bits."""
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    n, row = 40, 2**26
    space = torch.empty(n * row, dtype=torch.float16, device=device)  # of which the host touches little

    def apart(near: Tensor) -> Tensor:
        return space.view(near.dtype).as_strided(near.shape, (0, 16, row * 2 // near.itemsize, 1)).copy_(near)

    query, key, value = (torch.randn(1, 2, n, 16, device=device).half() for _ in range(3))
    q_positions, k_positions = torch.randint(n, (2, n), device=device)
    wanted = biased_attention(query, key, value, ALiBi(slopes := torch.rand(2, device=device)))
    made = biased_attention(apart(query), key, value, ALiBi(slopes))
    assert torch.equal(made, wanted)
    wanted = biased_attention(query, key, value, ALiBi(slopes, q_positions=q_positions, k_positions=k_positions))
    far = space.view(torch.int64).as_strided((n,), (row // 4,), 1).copy_(q_positions)
    made = biased_attention(query, key, value, ALiBi(slopes, q_positions=far, k_positions=k_positions))
    assert torch.equal(made, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("bias", "mask"),
    [
        ("none", "causal"), ("factored", "lengths"), ("alibi", "causal"), ("positions", "segments"),
        ("distance", "lengths"), ("row", "none"), ("table", "none"),
    ],
)  # fmt: skip
def test_memory_grows_with_the_length(bias: str, mask: str, device: str) -> None:
    n, heads = 32_768, 2
    floating = {
        "query": (1, heads, n, 32), "key": (1, heads, n, 32), "value": (1, heads, n, 32), "q_factor": (heads, n, 8),
        "k_factor": (heads, n, 8), "x_q": (n, 3), "x_k": (n, 3), "weight": (heads, n), "row": (heads, 1, n),
        "slopes": (heads,), "table": (heads, 255),
    }  # fmt: skip
    tensors = {name: torch.randn(shape, device=device) for name, shape in floating.items()}
    tensors |= {name: tensors[name].half() for name in QKV}
    ids = torch.arange(n, device=device)
    tensors |= {"q_positions": ids, "k_positions": ids, "q_ids": ids // 100, "k_ids": ids // 100}
    tensors["lengths"] = torch.tensor(n - 5, device=device)
    attend = attend_with(BIASES[bias], MASKS[mask])
    run(attend, tensors)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(attend, tensors)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < heads * n * n // 8, f"{peak / 2**20:.0f} MiB, more than a bit for each score"


@pytest.mark.gpu
def test_memory_of_a_shared_dense_bias_does_not_grow_with_the_batch(device: str) -> None:
    n, batch = 4096, 16
    tensors = {name: torch.randn(batch, 1, n, 16, device=device, dtype=torch.float16) for name in QKV}
    tensors["values"] = torch.randn(1, 1, n, n, device=device, dtype=torch.float16)
    attend = attend_with(BIASES["dense"], MASKS["none"])
    run(attend, tensors)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(attend, tensors)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < batch * n * n * 2, f"{peak / 2**20:.0f} MiB, as much as the scores of the batch"


def test_flash_bias_func_compiles(device: str) -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, n, 2, 16, device=device) for n in (5, 9, 9))
    factors = torch.randn(1, 5, 1, 4, device=device), torch.randn(2, 9, 2, 4, device=device)
    mask = torch.randn(2, 1, 5, 9, device=device)
    compiled = torch.compile(flash_bias_func, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, *factors, mask, True), flash_bias_func(q, k, v, *factors, mask, True))
