"""Triangle attention: what the replacement computes, against the host's torch kernel on the same weights."""

import copy

import pytest
import torch
from torch.utils import checkpoint

from flashbias import DenseBias, Segments
from flashbias.integrations import verify
from flashbias.integrations.protenix import fused
from flashbias.testing import assert_as_accurate

from .conftest import DEVICE


def make_input(n, c=24, batch=()):
    return torch.randn(*batch, n, n, c, device=DEVICE)


def make_mask(n, batch=()):
    """Ones and zeros, every row and every column with at least one pair."""
    mask = (torch.rand(*batch, n, n, device=DEVICE) < 0.7).float()
    return torch.maximum(mask, torch.eye(n, device=DEVICE))


def run(module, x, dtype=torch.float32, autocast=False, mask=None, **options):
    """Output, and the gradients of the input and of every parameter, by name."""
    module = copy.deepcopy(module).to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    mask = mask.to(dtype) if mask is not None else None
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = module(x, mask=mask, **options)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).sin().to(out.dtype))
    rows = x[..., 0].numel()
    gradients = {name: parameter.grad / rows**0.5 for name, parameter in module.named_parameters()}
    return {"out": out, "x": x.grad, **gradients}


def assert_like_the_host(stock, module, x, autocast=False, **options):
    with stock():
        oracle = run(module, x, torch.float64, **options)
        theirs = run(module, x, autocast=autocast, **options)
    ours = run(module, x, autocast=autocast, **options)
    assert ours["out"].dtype == theirs["out"].dtype
    for name in oracle:
        assert ours[name].abs().max() > 0
        dtype = torch.bfloat16 if autocast else torch.float32
        assert_as_accurate(name, ours[name], theirs[name], oracle[name], dtype)


@pytest.mark.parametrize("starting", [True, False], ids=["starting", "ending"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("n", "autocast"), [(12, False), (16, True), (33, False), (40, True), (100, False)])
def test_output_and_gradients_are_those_of_the_host(make_triangle, stock, calls, n, autocast, masked, starting):
    mask = make_mask(n) if masked else None
    assert_like_the_host(stock, make_triangle(starting), make_input(n), autocast, mask=mask)
    assert len(calls) == 1


@pytest.mark.parametrize("batch", [(2,), (2, 3)], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_leading_batch_dimensions(make_triangle, stock, batch, chunk_size):
    x, mask = make_input(11, batch=batch), make_mask(11, batch)
    assert_like_the_host(stock, make_triangle(starting=False), x, mask=mask, chunk_size=chunk_size)


@pytest.mark.parametrize("starting", [True, False], ids=["starting", "ending"])
@pytest.mark.parametrize("inplace_safe", [False, True])
@pytest.mark.parametrize(("chunk_size", "expected"), [(4, [4, 4, 4, 1]), (13, [13]), (100, [13])])
def test_chunks_of_rows(make_triangle, stock, calls, starting, inplace_safe, chunk_size, expected):
    module, x, mask = make_triangle(starting), make_input(13), make_mask(13)
    before = x.clone()
    with torch.no_grad():
        with stock():
            theirs = module(x, mask, chunk_size=chunk_size, inplace_safe=inplace_safe)
        ours = module(x, mask, chunk_size=chunk_size, inplace_safe=inplace_safe)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert [args[0].shape[-4] for args, _ in calls] == expected


@pytest.mark.parametrize("inplace_safe", [False, True])
def test_chunks_keep_the_dtype_of_the_host(make_triangle, stock, inplace_safe):
    module, x = make_triangle(), make_input(9)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        with stock():
            theirs = module(x, chunk_size=4, inplace_safe=inplace_safe)
        ours = module(x, chunk_size=4, inplace_safe=inplace_safe)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_throughout(make_triangle, stock, dtype):
    module, x = make_triangle(), make_input(21)
    with torch.no_grad():
        with stock():
            oracle = module.double()(x.double())
            theirs = module.to(dtype)(x.to(dtype))
        ours = module(x.to(dtype))
    assert ours.dtype == dtype
    assert_as_accurate("out", ours, theirs, oracle, dtype)


@pytest.mark.parametrize("kernel", ["torch", "cuequivariance", "triattention", "deepspeed"])
@pytest.mark.parametrize("n", [12, 20])
def test_whatever_kernel_is_asked_for(make_triangle, stock, kernel, n):
    module, x = make_triangle(), make_input(n)
    with torch.no_grad():
        with stock():
            expected = module(x, triangle_attention="torch")
        torch.testing.assert_close(module(x, triangle_attention=kernel), expected, rtol=1e-5, atol=1e-5)


def test_a_row_without_keys_gets_no_update(make_triangle, stock):
    module, x, mask = make_triangle(), make_input(10), make_mask(10)
    mask[3] = 0
    with torch.no_grad():
        with stock():
            theirs = module(x, mask)
        ours = module(x, mask)
    assert ours[3].abs().max() == 0
    others = torch.arange(10) != 3
    torch.testing.assert_close(ours[others], theirs[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True], ids=["four products", "one product"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_nothing_is_copied_or_expanded(make_triangle, calls, monkeypatch, chunk_size, joint):
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    if not joint:
        monkeypatch.setattr(fused, "parts", lambda module, x: fused.Parts())
    heads, c, n, mask = 2, 8, 8, make_mask(8)
    width = heads * c * (4 if joint else 1)
    with torch.no_grad():
        make_triangle(heads=heads)(make_input(n), mask, chunk_size=chunk_size)
    for (query, key, value, bias), options in calls:
        rows = query.shape[0]
        for tensor in (query, key, value):
            assert tensor.shape == (rows, heads, n, c)
            assert tensor.stride() == (n * width, c, width, 1)  # as the product has written it
            assert tensor._base.numel() == rows * n * width
        assert isinstance(bias, DenseBias)
        assert bias.values.shape == (1, heads, n, n)
        assert isinstance(options["mask"], Segments)
        assert options["mask"].k_ids.numel() == rows * n


def test_without_a_mask_the_operator_gets_none(make_triangle, calls):
    make_triangle()(make_input(9))
    assert [options["mask"] for _, options in calls] == [None]


def test_ungated_attention(make_triangle, stock):
    module, x = make_triangle(), make_input(14)
    module.mha.linear_g = None
    assert_like_the_host(stock, module, x)


def test_activation_checkpointing(make_triangle, calls):
    module, x = make_triangle(), make_input(12).requires_grad_()
    module(x).sum().backward()
    expected, x.grad = x.grad.clone(), None
    checkpoint.checkpoint(module, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert len(calls) == 3


def test_copies_and_state_dicts_are_the_hosts(make_triangle, stock):
    with stock():
        module = make_triangle()
        names = list(module.state_dict())
    copied = copy.deepcopy(module)
    assert list(copied.state_dict()) == names
    x = make_input(12)
    torch.testing.assert_close(copied(x), module(x))


def test_other_dtypes_and_hooks_are_left_to_the_host(make_triangle, calls, caplog):
    module, x = make_triangle(), make_input(9)
    module.double()(x.double())
    module.float()
    seen = []
    handle = module.mha.register_forward_hook(lambda *args: seen.append(1))
    module(x)
    handle.remove()
    assert (len(calls), len(seen)) == (0, 1)
    assert "torch.float64 is not covered" in caplog.text
    assert "a hook on the attention module" in caplog.text
    module(x)
    assert len(calls) == 1


def test_verified_run(make_triangle, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_VERIFY", "1")
    module = make_triangle()
    with torch.no_grad():
        module(make_input(12), make_mask(12))
    (found,) = verify.differences()
    assert 0 < found.difference < 1e-5 < found.largest


def test_compiled(make_triangle, stock):
    module, x, mask = make_triangle(), make_input(18), make_mask(18)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours = compiled(x, mask)
        with stock():
            torch.testing.assert_close(ours, module(x, mask), rtol=1e-5, atol=1e-5)
