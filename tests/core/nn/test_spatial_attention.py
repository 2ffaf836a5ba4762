"""`flashbias.nn.SpatialAttention`, against the same by the book in float64."""

import copy

import pytest
import torch

from flashbias.errors import DeviceError, DtypeError, ShapeError
from flashbias.masks import KeyPadding
from flashbias.nn import SpatialAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_the_book(module, x, points, context=None, context_points=None):
    """The formula, in the dtype of the module."""
    context, context_points = (x, points) if context is None else (context, context_points)
    by_head = (module.heads, module.dim_head)
    query = module.to_query(x).unflatten(-1, by_head).transpose(1, 2)
    key, value = (f(context).unflatten(-1, by_head).transpose(1, 2) for f in (module.to_key, module.to_value))
    weight = module.to_weight(x).transpose(1, 2)[..., None]
    square = (points[:, :, None] - context_points[:, None]).square().sum(-1)[:, None]
    scores = query @ key.mT * module.dim_head**-0.5 - weight * square
    return module.to_out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def run(module, forward, inputs, dtype):
    """Output, and gradients of the inputs and of every parameter."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out = forward(module, *inputs)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).sin().to(dtype))
    return [out.detach(), *(tensor.grad for tensor in inputs), *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
@pytest.mark.parametrize("crossed", [False, True], ids=["self", "cross"])
def test_output_and_gradients(dimensions, crossed):
    module = SpatialAttention(24, 3, 16, bias=True).to(DEVICE)
    shapes = [(2, 37, 24), (2, 37, dimensions), (2, 50, 24), (2, 50, dimensions)][: 4 if crossed else 2]
    inputs = [torch.randn(shape, device=DEVICE) for shape in shapes]
    oracle = run(module, by_the_book, inputs, torch.float64)
    assert all(wanted.abs().max() > 0 for wanted in oracle[:3])
    for ours, wanted in zip(run(module, SpatialAttention.__call__, inputs, torch.float32), oracle, strict=True):
        # fp32 throughout, sums over at most 100 points: some 1e-6 of the largest entry.
        assert (ours.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max().clamp(min=0.01)


@pytest.mark.parametrize("place", [0.0, 1000.0])
def test_it_does_not_matter_where_the_points_lie(place):
    module = SpatialAttention(16, 2).to(DEVICE)
    x, points = torch.randn(1, 40, 16, device=DEVICE), torch.randn(1, 40, 3, device=DEVICE)
    points = points + place
    with torch.no_grad():
        ours = module(x, points)
        oracle = by_the_book(module.double(), x.double(), points.double())
    assert (ours.double() - oracle).abs().max() <= 1e-5


def test_padding_is_not_attended_to():
    module = SpatialAttention(16, 2).to(DEVICE)
    x, points = torch.randn(2, 20, 16, device=DEVICE), torch.randn(2, 20, 3, device=DEVICE)
    with torch.no_grad():
        ours = module(x, points, mask=KeyPadding(torch.tensor([20, 11], device=DEVICE)))
        torch.testing.assert_close(ours[1, :11], module(x[1:, :11], points[1:, :11])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[:1], module(x[:1], points[:1]), rtol=1e-5, atol=1e-5)


def test_distances_stay_exact_under_autocast():
    """Weights of 1 and distances of up to 100 in half precision would move scores by 0.1 and more."""
    module = SpatialAttention(16, 2).to(DEVICE)
    torch.nn.init.zeros_(module.to_query.weight)
    torch.nn.init.zeros_(module.to_weight.weight)
    torch.nn.init.ones_(module.to_weight.bias)
    torch.nn.init.eye_(module.to_value.weight)
    torch.nn.init.eye_(module.to_out.weight)
    torch.nn.init.zeros_(module.to_out.bias)
    x, points = torch.randn(1, 60, 16, device=DEVICE), 1000 + 3 * torch.randn(1, 60, 3, device=DEVICE)
    with torch.no_grad():
        oracle = by_the_book(copy.deepcopy(module).double(), x.double(), points.double())
        with torch.autocast(DEVICE, torch.bfloat16):
            ours = module(x, points)
    # Features and weights of attention are rounded to bf16, three times on the way.
    assert (ours.double() - oracle).abs().max() <= 4 * 2**-8 * oracle.abs().max()


def test_compiles_as_one_graph():
    module = SpatialAttention(16, 2).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (17, 23):
        x, points = torch.randn(1, n, 16, device=DEVICE), torch.randn(1, n, 3, device=DEVICE)
        torch.testing.assert_close(compiled(x, points), module(x, points), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "found"),
    [
        (lambda: SpatialAttention(30, 4), ShapeError, "dim 30"),
        (lambda: SpatialAttention(16, 2)(torch.randn(1, 5, 16), torch.randn(1, 6, 3)), ShapeError, "x_q"),
        (lambda: SpatialAttention(16, 2)(*[torch.randn(1, 5, 16)] * 3), ShapeError, "only one"),
        (lambda: SpatialAttention(16, 2)(torch.randn(1, 5, 16), torch.ones(1, 5, 3).int()), DtypeError, "int32"),
        (
            lambda: SpatialAttention(16, 2)(torch.randn(1, 5, 16), torch.ones(1, 5, 3, device="meta")),
            DeviceError,
            "meta",
        ),
    ],
    ids=["heads", "points", "context", "dtype", "device"],
)
def test_bad_input_is_refused(call, error, found):
    with pytest.raises(error, match=found):
        call()
