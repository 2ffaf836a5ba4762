"""Halves in the place of tf32: where they are used, and what they lose beside tf32."""

import copy
import math

import pytest
import torch

from flashbias import DenseBias, biased_attention
from flashbias.integrations.protenix import precision

from .conftest import DEVICE, give_structure

SCALE = 24**-0.5


@pytest.fixture
def permitted(monkeypatch):
    """What a GPU does where tf32 is permitted, on any device."""

    def permits(x, scores):
        return x.dtype == torch.float32 and not torch.is_grad_enabled() and scores >= precision.ENOUGH_SCORES

    monkeypatch.setattr(precision, "ENOUGH_SCORES", 1)
    monkeypatch.setattr(precision, "permits_halves", permits)


@pytest.fixture
def matmul():
    """torch's switch, put back afterwards."""
    switch, name = torch.backends.cuda.matmul, "allow_tf32"
    before = switch.allow_tf32
    yield switch
    if hasattr(switch, "fp32_precision"):
        switch.fp32_precision = "ieee"
    setattr(switch, name, before)


def as_tf32(x):
    """Rounded to 10 bits behind the first, to the nearest, as tensor cores take fp32 where torch permits it."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def attention(query, key, value, bias, rounded=lambda x: x):
    scores = rounded(query) @ rounded(key).mT * SCALE + bias
    return rounded(scores.softmax(-1)) @ rounded(value)


@pytest.fixture(params=["operations", "kernels"])
def by(request, monkeypatch):
    """What makes halves: torch's operations, or the two kernels, through the interpreter where there is no GPU."""
    monkeypatch.setattr(precision, "_has_kernels", lambda *tensors: request.param == "kernels")
    return request.param


def by_halves(query, key, value, bias):
    *halves, scale, unit = precision.as_halves(query, key, value, SCALE)
    return precision.in_units(biased_attention(*halves, DenseBias(bias), scale=scale), unit).transpose(-2, -3)


def draw(n=150, c=24, heads=2, batch=(2,), scales=(1.0, 1.0, 1.0)):
    return [scale * torch.randn(*batch, heads, n, c, device=DEVICE) for scale in scales]


@pytest.mark.parametrize(
    "scales",
    [
        (1, 1, 1),
        (30, 1, 1e-3),
        (1e-6, 1e6, 1e6),
        (1e6, 1e-6, 1e-6),
        (1e-6, 1e-6, 1),
        (1e6, 1e6, 1),  # scores beyond what halves can hold the factors of
        (1e20, 1e20, 1e20),
        (0, 1, 1),
        (1, 0, 1),
        (1, 1, 0),
        (0, 0, 0),
    ],
)
def test_nothing_is_lost_that_tf32_keeps(by, scales):
    torch.manual_seed(0)
    inputs = draw(scales=scales)
    bias = torch.randn(2, 150, 150, device=DEVICE)
    exact = attention(*(x.double() for x in (*inputs, bias)))
    theirs, ours = attention(*inputs, bias, as_tf32), by_halves(*inputs, bias)
    assert ours.dtype == torch.float32
    if max(scales) < 1e20:  # where scores overflow fp32 nothing can be compared
        assert (ours - exact).norm() <= 1.3 * (theirs - exact).norm()
    assert ours.isfinite().all()


def test_heads_have_units_of_their_own(by):
    torch.manual_seed(0)
    heads = torch.tensor([1e-5, 1e5], device=DEVICE)[:, None, None]
    query, key, value = draw()
    inputs = query * heads, key / heads, value * heads
    bias = torch.randn(2, 150, 150, device=DEVICE)
    exact = attention(*(x.double() for x in (*inputs, bias)))
    theirs, ours = attention(*inputs, bias, as_tf32), by_halves(*inputs, bias)
    for head in range(2):
        assert (ours - exact)[:, head].norm() <= 1.3 * (theirs - exact)[:, head].norm()


def test_a_row_with_one_huge_score_gets_a_value_and_not_a_multiple_of_it(by):
    """Kernels multiply by log2(e) and subtract at once: what rounding leaves of the largest exponent has to be 0."""
    log2_e = torch.tensor(1 / math.log(2), dtype=torch.float32)
    assert log2_e * torch.tensor(precision.SCALE, dtype=torch.float32) == 1
    query, key, value = draw(scales=(1e9, 1e9, 1))
    out = by_halves(query.abs(), key.abs(), value, torch.zeros(2, 150, 150, device=DEVICE))
    assert out.isfinite().all()
    rows = (out[..., None, :] - value[..., None, :, :]).abs().amax(-1).amin(-1)
    assert rows.max() <= 2**-10 * value.abs().amax()


def test_halves_lie_as_what_they_are_made_of(monkeypatch):
    monkeypatch.setattr(precision, "_has_kernels", lambda *tensors: False)
    query, key, value = (x.transpose(-2, -3).contiguous().transpose(-2, -3) for x in draw())
    for made, x in zip(precision.as_halves(query, key, value, SCALE), (query, key, value), strict=False):
        assert made.stride() == x.stride()
    out = draw()[0].half()
    made = precision.in_units(out, torch.ones(2, 2, 1, 1, device=DEVICE))
    assert made.shape == (2, 150, 2, 24)
    assert made.is_contiguous()


def test_kernels_make_halves_of_fp32_that_is_all_alike(monkeypatch):
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    query, key, value = draw()
    assert precision._has_kernels(query, key[..., :9, :], value[..., :9, :])
    assert not precision._has_kernels(query, key, value[..., :9])  # another number of features
    assert not precision._has_kernels(query[:1], key, value)
    assert not precision._has_kernels(query.double(), key.double(), value.double())
    assert not precision._has_kernels(query[..., :0, :], key, value)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not precision._has_kernels(query, key, value)


def test_nan_stays_in_its_head(by):
    query, key, value = draw()
    value[0, 1, 3, 2] = torch.nan
    out = by_halves(query, key, value, torch.zeros(2, 150, 150, device=DEVICE))
    assert out[0, 1].isnan().any()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()


def test_a_bias_beyond_halves_stays_finite():
    bias = precision.to_half(torch.tensor([1e6, -1e6, 3.0, torch.nan]))
    assert bias[:3].tolist() == [65504, -65504, 3]
    assert bias[3].isnan()


def test_the_switches_of_torch_are_followed(matmul):
    matmul.allow_tf32 = False
    assert not precision.tf32_is_permitted()
    matmul.allow_tf32 = True
    assert precision.tf32_is_permitted()
    torch.set_float32_matmul_precision("highest")
    assert not precision.tf32_is_permitted()
    torch.set_float32_matmul_precision("high")
    assert precision.tf32_is_permitted()
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = "ieee"
        assert not precision.tf32_is_permitted()
        matmul.fp32_precision = "tf32"  # from here on the old switch cannot be read
        assert precision.tf32_is_permitted()


def test_only_much_fp32_on_a_gpu_without_gradients(monkeypatch):
    class OnGpu:
        """As much of a tensor as is looked at."""

        def __init__(self, dtype=torch.float32, device="cuda"):
            self.dtype, self.device = dtype, torch.device(device)

    monkeypatch.setattr(precision, "tf32_is_permitted", lambda: True)
    assert not precision.permits_halves(OnGpu(), 2**25)  # gradients are recorded
    with torch.no_grad():
        assert precision.permits_halves(OnGpu(), 2**25)
        assert not precision.permits_halves(OnGpu(), 2**25 - 1)
        assert not precision.permits_halves(OnGpu(device="cpu"), 2**25)
        assert not precision.permits_halves(OnGpu(torch.bfloat16), 2**25)
        with monkeypatch.context() as autocast:
            autocast.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
            assert not precision.permits_halves(OnGpu(), 2**25)
        monkeypatch.setattr(precision, "tf32_is_permitted", lambda: False)
        assert not precision.permits_halves(OnGpu(), 2**25)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("chunk_size", "inplace_safe"), [(None, False), (5, False), (5, True)])
def test_triangle_attention(make_triangle, stock, calls, permitted, masked, chunk_size, inplace_safe):
    torch.manual_seed(0)
    module, n = make_triangle(), 21
    x = torch.randn(n, n, 24, device=DEVICE)
    mask = torch.maximum((torch.rand(n, n, device=DEVICE) < 0.7).float(), torch.eye(n, device=DEVICE))
    with torch.no_grad():
        ours = module(x, mask if masked else None, chunk_size=chunk_size, inplace_safe=inplace_safe)
        with stock():
            exact = copy.deepcopy(module).double()(x.double(), mask.double() if masked else None)
    for (*inputs, bias), _ in calls:
        assert {tensor.dtype for tensor in (*inputs, bias.values)} == {torch.float16}
    assert ours.dtype == torch.float32
    assert 1e-6 < (ours - exact).norm() / exact.norm() < 2**-10


@pytest.mark.parametrize(("more", "expected"), [(0, torch.float16), (1, torch.float32)], ids=["enough", "too few"])
def test_all_rows_decide_for_their_chunks(make_triangle, calls, permitted, monkeypatch, more, expected):
    n, heads = 9, 3
    monkeypatch.setattr(precision, "ENOUGH_SCORES", n**3 * heads + more)
    with torch.no_grad():
        make_triangle(heads=heads)(torch.randn(n, n, 24, device=DEVICE), chunk_size=2)
    assert len(calls) == 5
    for (*inputs, bias), _ in calls:
        assert {tensor.dtype for tensor in (*inputs, bias.values)} == {expected}


@pytest.mark.parametrize(("more", "expected"), [(0, torch.float16), (1, torch.float32)], ids=["enough", "too few"])
def test_samples_and_heads_count_as_scores(host, calls, permitted, monkeypatch, more, expected):
    samples, heads, n = 3, 2, 17
    monkeypatch.setattr(precision, "ENOUGH_SCORES", samples * heads * n**2 + more)
    attention = give_structure(host.transformer.AttentionPairBias(n_heads=heads, c_a=48, c_s=20, c_z=12))
    with torch.no_grad():
        attention(
            *(torch.randn(samples, n, c, device=DEVICE) for c in (48, 20)), torch.randn(1, n, n, 12, device=DEVICE)
        )
    assert [args[0].dtype for args, _ in calls] == [expected]


@pytest.mark.parametrize(("head_dim", "batch"), [(24, ()), (48, (3,))])
def test_pair_biased_attention_keeps_the_bias_in_fp32(host, stock, calls, permitted, head_dim, batch):
    torch.manual_seed(0)
    c_a = 2 * head_dim
    attention = give_structure(host.transformer.AttentionPairBias(n_heads=2, c_a=c_a, c_s=20, c_z=12))
    a, s = torch.randn(*batch, 33, c_a, device=DEVICE), torch.randn(*batch, 33, 20, device=DEVICE)
    z = torch.randn(*(1 for _ in batch), 33, 33, 12, device=DEVICE)
    with torch.no_grad():
        ours = attention(a, s, z)
        with stock():
            exact = attention(a, s, z)
    ((*inputs, bias), _) = calls[0]
    assert {tensor.dtype for tensor in inputs} == {torch.float16}
    assert bias.values.dtype == torch.float32
    assert ours.dtype == torch.float32
    assert 1e-6 < (ours - exact).norm() / exact.norm() < 2**-10


def test_gradients_are_those_of_fp32(make_triangle, stock, permitted, calls):
    module, x = make_triangle(), torch.randn(14, 14, 24, device=DEVICE, requires_grad=True)
    module(x).square().sum().backward()
    ours, x.grad = x.grad, None
    with stock():
        module(x).square().sum().backward()
    assert calls[0][0][0].dtype == torch.float32
    torch.testing.assert_close(ours, x.grad, rtol=1e-4, atol=1e-4)


def test_compiled(make_triangle, permitted):
    module, x = make_triangle(), torch.randn(18, 18, 24, device=DEVICE)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, module(x), rtol=1e-3, atol=1e-3)
