"""Layer norm, projections and gate of triangle attention without the host's layers, beside the host's module."""

import copy
import importlib

import pytest
import torch
from torch import nn

from flashbias import plan
from flashbias.integrations.protenix import fused, precision
from flashbias.testing import assert_as_accurate

from .conftest import DEVICE

PARTS = ("norm", "bias", "joint", "gate", "out")
# Through the interpreter, products of bf16 are wrong.
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """What computes on a GPU, on any device."""
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")


@pytest.fixture
def used(monkeypatch):
    """The parts that were computed without the host's layers, of a triangle attention of 24 channels and 3 heads."""
    found = set()

    def watch(module, name, part):
        function = getattr(module, name)

        def watched(*args, **kwargs):
            found.add(part(*args))
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(importlib.import_module("flashbias.kernels.norm"), "layer_norm", lambda *args: "norm")
    watch(importlib.import_module("flashbias.kernels.gate"), "gated", lambda *args: "gate")
    watch(fused, "_product", lambda x, weight: {3: "bias", 96: "joint", 24: "out"}[len(weight)])
    watch(torch, "mm", lambda *args: "out")
    return found


def allow(monkeypatch, only):
    """Leave all other parts to the host."""
    parts, nothing = fused.parts, fused.Parts()._asdict()
    if only != "norm":
        monkeypatch.setattr(fused, "normalised", lambda norm, x: norm(x))
    others = {name: value for name, value in nothing.items() if name != only}
    monkeypatch.setattr(fused, "parts", lambda module, x: parts(module, x)._replace(**others))


def make_mask(n):
    return torch.maximum((torch.rand(n, n, device=DEVICE) < 0.7).float(), torch.eye(n, device=DEVICE))


def assert_like_the_host(stock, module, x, mask=None, autocast=False, **options):
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        with stock():
            theirs = module(x, mask, **options)
        ours = module(x, mask, **options)
    with torch.no_grad(), stock():
        oracle = copy.deepcopy(module).double()(x.double(), None if mask is None else mask.double(), **options)
    assert ours.dtype == theirs.dtype
    assert_as_accurate("out", ours, theirs, oracle, torch.bfloat16 if autocast else x.dtype)


@pytest.mark.parametrize("only", [None, *PARTS])
@pytest.mark.parametrize("starting", [True, False], ids=["starting", "ending"])
@pytest.mark.parametrize(("chunk_size", "inplace_safe"), [(None, False), (4, False), (4, True)])
def test_each_part_computes_what_the_host_does(
    make_triangle, stock, used, monkeypatch, only, starting, chunk_size, inplace_safe
):
    if only is not None:
        allow(monkeypatch, only)
    n = 13
    x, mask = torch.randn(n, n, 24, device=DEVICE), make_mask(n)
    before = x.clone()
    assert_like_the_host(stock, make_triangle(starting), x, mask, chunk_size=chunk_size, inplace_safe=inplace_safe)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert used == (set(PARTS) if only is None else {only})


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("n", "chunk_size"), [(1, None), (17, None), (18, 16), (20, 7)])
def test_sizes(make_triangle, stock, used, n, chunk_size, masked, dtype):
    module, x = make_triangle().to(dtype), torch.randn(n, n, 24, device=DEVICE, dtype=dtype)
    mask = make_mask(n).to(dtype) if masked else None
    assert_like_the_host(stock, module, x, mask, chunk_size=chunk_size, inplace_safe=True)
    assert used == set(PARTS)


@pytest.mark.parametrize("batch", [(2,), (2, 3)], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_leading_batch_dimensions(make_triangle, stock, used, batch, chunk_size):
    x = torch.randn(*batch, 11, 11, 24, device=DEVICE)
    assert_like_the_host(stock, make_triangle(False), x, chunk_size=chunk_size, inplace_safe=True)
    assert used == set(PARTS)


def test_halves_with_their_unit(make_triangle, stock, used, calls, monkeypatch):
    monkeypatch.setattr(precision, "permits_halves", lambda x, scores: True)
    n = 21
    module, x = make_triangle(), torch.randn(n, n, 24, device=DEVICE)
    with torch.no_grad():
        ours = module(x, chunk_size=5, inplace_safe=True)
        with stock():
            exact = copy.deepcopy(module).double()(x.double())
    for (*inputs, _), _ in calls:
        assert {tensor.dtype for tensor in inputs} == {torch.float16}
    assert used == set(PARTS)
    assert 1e-6 < (ours - exact).norm() / exact.norm() < 2**-10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(make_triangle, stock, used, dtype):
    x = torch.randn(40, 40, 24, device=DEVICE, dtype=dtype)
    assert_like_the_host(stock, make_triangle(), x, autocast=True, chunk_size=9, inplace_safe=True)
    # Attention gives bf16, and the host's layer says what becomes of it beside an input of fp32.
    assert used == set(PARTS) - ({"out"} if dtype == torch.float32 else set())


def test_dtypes_under_autocast_are_the_hosts(make_triangle, monkeypatch):
    """Of each part by itself, since bf16 products are wrong through the interpreter."""
    module, x = make_triangle(), torch.randn(9, 9, 24, device=DEVICE)
    mha = module.mha
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        for given in (x, x.bfloat16()):
            theirs = module.layer_norm(given)
            ours = fused.normalised(module.layer_norm, given)
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)
            parts = fused.parts(module, ours)
            bias = fused.projected(module.linear, ours, parts.bias)
            torch.testing.assert_close(bias, module.linear(ours), rtol=2**-7, atol=2**-7)
            *made, gate = fused.joined(mha, ours, parts.joint)
            expected = fused.joined(mha, ours, None)[:3]
            gate = gate.transpose(-2, -3).flatten(-2)
            for a, b in zip((*made, gate), (*expected, mha.linear_g(ours)), strict=True):
                torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
            out, place = torch.randn(9, 9, 24, device=DEVICE, dtype=gate.dtype), torch.empty_like(ours)
            for where in (None, place):
                made = fused.placed(mha.linear_o, out, parts.out, where)
                expected = mha.linear_o(out).to(made.dtype if where is None else place.dtype)
                torch.testing.assert_close(made, expected, rtol=2**-7, atol=2**-7)


def hook(module):
    module.register_forward_hook(lambda *args: None)


def replace(module):
    module.forward = module.forward  # as whoever wraps one object's method does


def subclass(module):
    module.__class__ = type(type(module).__name__, (type(module),), {})


def parametrise(module):
    nn.utils.parametrizations.weight_norm(module)


def add_bias(module):
    module.bias = nn.Parameter(torch.zeros(module.weight.shape[0], device=DEVICE))


def demand_precision(module):
    module.precision = torch.float32


@pytest.mark.parametrize("change", [hook, replace, subclass], ids=lambda change: change.__name__)
def test_a_layer_norm_that_is_not_the_hosts_own_is_called(make_triangle, used, change):
    module = make_triangle()
    change(module.layer_norm)
    with torch.no_grad():
        module(torch.randn(9, 9, 24, device=DEVICE), chunk_size=4, inplace_safe=True)
    assert used == set(PARTS) - {"norm"}


@pytest.mark.parametrize(("layer", "part"), [("linear_q", "joint"), ("linear_g", "joint"), ("linear_o", "out")])
@pytest.mark.parametrize(
    "change", [hook, replace, subclass, parametrise, add_bias, demand_precision], ids=lambda change: change.__name__
)
def test_a_projection_that_is_more_than_its_weight_is_called(make_triangle, stock, used, change, layer, part):
    module, x = make_triangle(), torch.randn(9, 9, 24, device=DEVICE)
    change(getattr(module.mha, layer))
    with torch.no_grad():
        ours = module(x, chunk_size=4, inplace_safe=True)
        assert used == set(PARTS) - {part}
        with stock():
            torch.testing.assert_close(ours, module(x), rtol=1e-5, atol=1e-5)


def test_a_hook_on_the_sigmoid_sees_what_the_host_gives_it(make_triangle, stock, used):
    module, seen = make_triangle(), []
    module.mha.sigmoid.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    x = torch.randn(9, 9, 24, device=DEVICE)
    with torch.no_grad():
        module(x)
        with stock():
            module(x)
    torch.testing.assert_close(*seen)
    assert used == set(PARTS) - {"gate"}


def test_a_hook_on_the_projection_of_the_bias_sees_it(make_triangle, used):
    module, seen = make_triangle(), []
    module.linear.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        module(torch.randn(9, 9, 24, device=DEVICE))
    assert seen == [1]
    assert used == set(PARTS) - {"bias"}


def test_ungated_attention(make_triangle, stock, used):
    module = make_triangle()
    module.mha.linear_g = None
    assert_like_the_host(stock, module, torch.randn(14, 14, 24, device=DEVICE), chunk_size=5, inplace_safe=True)
    assert used == {"norm", "bias", "out"}


def test_weights_are_read_anew(make_triangle, stock):
    module, other = make_triangle(), make_triangle()
    x = torch.randn(10, 10, 24, device=DEVICE)
    names = list(module.state_dict())
    assert_like_the_host(stock, module, x)
    module.load_state_dict(other.state_dict())
    assert_like_the_host(stock, module, x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), other(x), rtol=0, atol=0)
        module.mha.linear_q.weight.mul_(2)
    assert_like_the_host(stock, module, x)
    module.to(torch.float16)
    with torch.no_grad():
        assert module(x.half()).dtype == torch.float16
    assert list(module.state_dict()) == names


def test_gradients_are_recorded_by_the_hosts_layers(make_triangle, used, monkeypatch):
    module, x = make_triangle(), torch.randn(9, 9, 24, device=DEVICE, requires_grad=True)
    module(x, chunk_size=4, inplace_safe=True).sum().backward()
    assert used == set()
    assert x.grad.abs().max() > 0


def test_on_a_cpu_the_hosts_layers_compute(make_triangle, used, monkeypatch):
    monkeypatch.setattr(plan, "backend", lambda device: "cpu")
    with torch.no_grad():
        fused.normalised(make_triangle().layer_norm, torch.randn(9, 9, 24, device=DEVICE))
        assert fused.parts(make_triangle(), torch.randn(9, 9, 24, device=DEVICE)) == fused.Parts()
    assert used == set()
