"""Layer norm, projections, gate and the copy of triangle attention, each by its kernel, beside the host's module."""

import copy
import importlib

import pytest
import torch
from torch import nn

from flashbias import plan
from flashbias.integrations.protenix import fused, precision
from flashbias.testing import assert_as_accurate

from .conftest import DEVICE

PARTS = ("may_normalise", "may_join", "may_gate", "may_place")
# Through the interpreter, products of bf16 are wrong.
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """What computes on a GPU, on any device."""
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")


@pytest.fixture
def used(monkeypatch):
    """The parts that were computed by kernels."""
    found = set()

    def watch(module, name, part):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: found.add(part) or function(*args, **kwargs))

    watch(importlib.import_module("flashbias.kernels.norm"), "layer_norm", "may_normalise")
    watch(importlib.import_module("flashbias.kernels.gate"), "gated", "may_gate")
    watch(fused, "_product", "may_join")
    watch(torch, "mm", "may_place")
    return found


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
    for part in PARTS:
        if only not in (None, part):
            monkeypatch.setattr(fused, part, lambda *args: False)
    n = 13
    x, mask = torch.randn(n, n, 24, device=DEVICE), make_mask(n)
    before = x.clone()
    assert_like_the_host(stock, make_triangle(starting), x, mask, chunk_size=chunk_size, inplace_safe=inplace_safe)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    expected = set(PARTS) if only is None else {only}
    assert used == (expected if inplace_safe else expected - {"may_place"})


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("n", "chunk_size"), [(1, None), (17, None), (33, 16), (40, 7)])
def test_sizes(make_triangle, stock, used, n, chunk_size, masked, dtype):
    module, x = make_triangle().to(dtype), torch.randn(n, n, 24, device=DEVICE, dtype=dtype)
    mask = make_mask(n).to(dtype) if masked else None
    assert_like_the_host(stock, module, x, mask, chunk_size=chunk_size, inplace_safe=True)
    assert used >= {"may_normalise", "may_join", "may_gate"}


@pytest.mark.parametrize("batch", [(2,), (2, 3)], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_leading_batch_dimensions(make_triangle, stock, used, batch, chunk_size):
    x = torch.randn(*batch, 11, 11, 24, device=DEVICE)
    assert_like_the_host(stock, make_triangle(False), x, chunk_size=chunk_size, inplace_safe=True)
    assert used >= {"may_normalise", "may_join", "may_gate"}


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
    assert used >= {"may_normalise", "may_join", "may_gate"}


def test_dtypes_under_autocast_are_the_hosts(make_triangle, monkeypatch):
    """Of each part by itself, since bf16 products are wrong through the interpreter."""
    module, x = make_triangle(), torch.randn(9, 9, 24, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        for given in (x, x.bfloat16()):
            theirs = module.layer_norm(given)
            ours = fused.normalised(module.layer_norm, given)
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)
            joint = fused.joint_weight(module.mha, ours)
            made = fused.projected(module.mha, ours, joint)
            expected = fused.projected(module.mha, ours, None)[:3]
            for a, b in zip(made, (*expected, module.mha.linear_g(ours)), strict=True):
                torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
            out, place = torch.randn(9, 9, 24, device=DEVICE, dtype=made[0].dtype), torch.empty_like(ours)
            fused.placed(module.mha, out, place)
            torch.testing.assert_close(place, module.mha.linear_o(out).to(place.dtype), rtol=2**-7, atol=2**-7)


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
    assert used == set(PARTS) - {"may_normalise"}


@pytest.mark.parametrize("layer", ["linear_q", "linear_g", "linear_o"])
@pytest.mark.parametrize(
    "change", [hook, replace, subclass, parametrise, add_bias, demand_precision], ids=lambda change: change.__name__
)
def test_a_projection_that_is_more_than_its_weight_is_called(make_triangle, stock, used, change, layer):
    module, x = make_triangle(), torch.randn(9, 9, 24, device=DEVICE)
    change(getattr(module.mha, layer))
    with torch.no_grad():
        ours = module(x, chunk_size=4, inplace_safe=True)
        assert used == set(PARTS) - {"may_place" if layer == "linear_o" else "may_join"}
        with stock():
            torch.testing.assert_close(ours, module(x), rtol=1e-5, atol=1e-5)


def test_a_hook_on_the_sigmoid_sees_it(make_triangle, used):
    module, seen = make_triangle(), []
    module.mha.sigmoid.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        module(torch.randn(9, 9, 24, device=DEVICE))
    assert seen == [1]
    assert "may_gate" not in used


def test_ungated_attention(make_triangle, stock, used):
    module = make_triangle()
    module.mha.linear_g = None
    assert_like_the_host(stock, module, torch.randn(14, 14, 24, device=DEVICE), chunk_size=5, inplace_safe=True)
    assert used == {"may_normalise", "may_place"}


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
        assert fused.joint_weight(make_triangle().mha, torch.randn(9, 9, 24, device=DEVICE)) is None
    assert used == set()
