"""The neural solver: what the replacement computes, against the same formulas in float64."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flashbias import FactoredBias, biased_attention
from flashbias.errors import ShapeError, UnsupportedError

from .conftest import DEVICE

EPS = 2.0**-23  # of fp32


def by_the_book(attention, x, points):
    """Attention with exact distances, in the dtype of x; and the scores' bias."""
    by_head = (attention.heads, attention.dim_head)
    query, key, value = (
        f(x).unflatten(-1, by_head).transpose(1, 2) for f in (attention.to_q, attention.to_k, attention.to_v)
    )
    weight = attention.pos_weight(x.unflatten(-1, by_head)).transpose(1, 2)
    bias = -weight * (points[:, :, None] - points[:, None]).square().sum(-1)[:, None]
    out = (query @ key.mT * attention.scale + bias).softmax(-1) @ value
    return attention.to_out(out.transpose(1, 2).flatten(2))


def ours(model):
    return lambda attention, x, points: attention(x, *model.get_matrix(points))


def run(attention, forward, x, points, dtype=torch.float32, gradient=1.0):
    """Output, and the gradients of the input, the points and every parameter, by name."""
    attention = copy.deepcopy(attention).to(dtype)
    x, points = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, points))
    out = forward(attention, x, points)
    out.backward(gradient * torch.linspace(-1, 2, out.numel(), device=DEVICE).view_as(out).sin().to(out.dtype))
    gradients = {name: parameter.grad for name, parameter in attention.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "points": points.grad, **gradients}


def assert_close(ours, oracle, tolerance):
    """Relative to the largest entry of each."""
    for name, wanted in oracle.items():
        assert wanted.abs().max() > 0, name
        error = (ours[name].double() - wanted.double()).abs().max() / wanted.abs().max()
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.fixture
def problem(make_model):
    """`problem(space, n=60)`: a model, its first attention, an input and points."""

    def make(space, n=60, batch=2):
        model = make_model(space)
        x = torch.randn(batch, n, 32, device=DEVICE)
        return model, model.blocks[0].Attn, x, torch.randn(batch, n, space, device=DEVICE)

    return make


@pytest.mark.parametrize("space", [2, 3])
@pytest.mark.parametrize("n", [1, 60, 333])
def test_output_and_all_gradients(neural_solver, problem, space, n):
    neural_solver.configure(precision="single")
    model, attention, x, points = problem(space, n)
    weight = attention.pos_weight(x.unflatten(-1, (2, 16)))
    assert n == 1 or (weight.min() < 0 < weight.max()), "both signs occur"
    oracle = run(attention, by_the_book, x, points, torch.float64)
    if n == 1:  # nothing but the value matters
        oracle = {"out": oracle["out"]}
    # fp32: sums over n points, weights of distances that the logits amplify by up to 50.
    assert_close(run(attention, ours(model), x, points), oracle, 200 * EPS)


@pytest.mark.parametrize(("precision", "eps"), [("half", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_lower_precision_rounds_features_only(neural_solver, problem, precision, eps):
    neural_solver.configure(precision=precision)
    model, attention, x, points = problem(3)
    oracle = run(attention, by_the_book, x, points, torch.float64)
    results = run(attention, ours(model), x, points)
    assert results["out"].dtype == torch.float32
    assert_close(results, oracle, 8 * eps)


def test_cpus_compute_in_single_precision(neural_solver):
    assert neural_solver.attention.dtype_of(torch.empty(1, 2**17, 1), "auto") == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize(("points", "dtype"), [(2**16, torch.float16), (2**16 + 1, torch.bfloat16)])
def test_gpus_compute_in_half_precision_as_long_as_it_holds_a_mean_weight(neural_solver, points, dtype):
    assert neural_solver.attention.dtype_of(torch.empty(1, points, 1, device="cuda"), "auto") == dtype


@pytest.mark.parametrize("gradient", [1e-12, 1e-9, 1e6])
def test_small_and_large_gradients_survive_half_precision(neural_solver, problem, gradient):
    neural_solver.configure(precision="half")
    model, attention, x, points = problem(2)
    oracle = run(attention, by_the_book, x, points, torch.float64, gradient)
    assert_close(run(attention, ours(model), x, points, gradient=gradient), oracle, 8 * 2.0**-11)


@pytest.mark.parametrize("precision", ["half", "single"])
@pytest.mark.parametrize("moving", [False, True])
def test_coordinates_that_need_no_gradient_cost_none(neural_solver, problem, monkeypatch, precision, moving):
    neural_solver.configure(precision=precision)
    seen = []
    bias = neural_solver.attention.FactoredBias

    def watched(q_factor, k_factor):
        seen.append((q_factor.requires_grad, k_factor.requires_grad))
        return bias(q_factor, k_factor)

    monkeypatch.setattr(neural_solver.attention, "FactoredBias", watched)
    model, attention, x, points = problem(2)
    ours(model)(attention, x, points.requires_grad_(moving)).sum().backward()
    assert seen == [(True, moving)]
    assert (points.grad is not None) == moving


def test_gradient_of_nothing_is_nothing(neural_solver, problem):
    neural_solver.configure(precision="half")
    model, attention, x, points = problem(2)
    results = run(attention, ours(model), x, points, gradient=0.0)
    assert all(torch.equal(value, torch.zeros_like(value)) for name, value in results.items() if name != "out")


@pytest.mark.parametrize("precision", ["half", "single"])
def test_second_derivatives_are_refused_by_name(neural_solver, problem, precision):
    neural_solver.configure(precision=precision)
    model, attention, x, points = problem(2)
    loss = ours(model)(attention, x.requires_grad_(), points).square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    assert first.isfinite().all()
    with pytest.raises(UnsupportedError, match="second derivative"):
        first.square().sum().backward()


def test_checkpointing_gives_the_same_gradients(neural_solver, problem):
    neural_solver.configure(precision="half")
    model, attention, x, points = problem(3)
    plain = run(attention, ours(model), x, points)
    again = run(attention, lambda *args: checkpoint(ours(model), *args, use_reentrant=False), x, points)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def logits(model, points, weight):
    """The bias that the factors stand for, as they are multiplied in the operator: `(B, N, N)`."""
    q_factor, k_factor = model.get_matrix(points)
    return (weight * q_factor.double()).squeeze(2) @ k_factor.double().squeeze(2).mT


@pytest.mark.parametrize("space", [2, 3])
@pytest.mark.parametrize("place", [0.0, 100.0, -1000.0, 1000.0])
@pytest.mark.parametrize("extent", [0.01, 1.0, 10.0, 300.0])
def test_logits_are_exact_wherever_the_body_lies(host, make_model, space, place, extent):
    points = place + extent * (torch.rand(2, 200, space, device=DEVICE) - 0.5) / space**0.5
    exact = -(points.double()[:, :, None] - points.double()[:, None]).square().sum(-1)
    error = (logits(make_model(space), points, 1.0) - exact).abs().max().item()
    assert error <= (1e-4 if extent <= 10 else 2.0**-21 * extent**2)


@pytest.mark.parametrize("precision", ["half", "single"])
@pytest.mark.parametrize("weight", [1.0, -1.0])
@pytest.mark.parametrize("place", [0.0, -1000.0, 1000.0])
@pytest.mark.parametrize("extent", [10.0, 300.0])
def test_operator_adds_these_logits(neural_solver, make_model, precision, weight, place, extent):
    """The only key's logit is the LSE: one key in each row of the batch, and queries that are zero."""
    points = place + torch.rand(1, 64, 3, device=DEVICE) * extent / 3**0.5
    q_factor, k_factor = make_model(3).get_matrix(points)
    bias = FactoredBias(weight * q_factor.transpose(1, 2), k_factor.transpose(0, 1))
    query = torch.zeros(64, 1, 64, 16, device=DEVICE, dtype=neural_solver.attention.DTYPES[precision])
    key = query[:, :, :1]
    _, lse = biased_attention(query, key, key, bias, return_lse=True)  # (key, 1, query)
    exact = -weight * (points.double().transpose(0, 1) - points.double()).square().sum(-1)
    assert (lse[:, 0].double() - exact).abs().max() <= (1e-4 if extent <= 10 else 2.0**-21 * extent**2)


def test_bodies_of_a_batch_may_lie_far_apart(host, make_model):
    points = torch.rand(2, 50, 3, device=DEVICE) + torch.tensor([-1000.0, 1000.0], device=DEVICE)[:, None, None]
    exact = -(points.double()[:, :, None] - points.double()[:, None]).square().sum(-1)
    assert (logits(make_model(3), points, 1.0) - exact).abs().max() <= 1e-5


@pytest.mark.parametrize("precision", ["single", "half"])
def test_attention_does_not_depend_on_the_place(neural_solver, problem, precision):
    neural_solver.configure(precision=precision)
    model, attention, x, points = problem(3)
    points = (points * 64).round() / 64  # so that moving them is exact
    with torch.no_grad():
        here, there = (ours(model)(attention, x, points + place) for place in (0.0, 1000.0))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5 if precision == "single" else 1e-3)


def test_weights_of_distances_stay_fp32_under_autocast(neural_solver, problem):
    neural_solver.configure(precision="single")
    model, attention, x, points = problem(3)
    points = 4 * points  # distances of up to 300: a weight in bf16 would move scores by 1
    torch.nn.init.zeros_(attention.to_q.weight)
    with torch.no_grad():
        oracle = by_the_book(copy.deepcopy(attention).double(), x.double(), points.double())
        with torch.autocast(DEVICE, torch.bfloat16):
            made = attention(x, *model.get_matrix(points))
    # Values, output and projection are rounded to bf16.
    assert (made.double() - oracle).abs().max() <= 8 * 2.0**-8 * oracle.abs().max()


@pytest.mark.parametrize("shape", [(1, 10, 4), (1, 10, 1), (10, 3), (1, 2, 10, 3)])
def test_other_points_are_refused(host, make_model, shape):
    with pytest.raises(ShapeError, match=r"wanted: \(B, N, 2\) or \(B, N, 3\)"):
        make_model(3).get_matrix(torch.zeros(shape, device=DEVICE))


def test_kernels_take_factors_of_any_bias(neural_solver, host):
    import layers.flash_bias_triton as kernels

    q, k, v = torch.randn(3, 2, 40, 2, 16, device=DEVICE).half().unbind()
    factors = torch.randn(2, 2, 40, 2, 5, device=DEVICE)
    out = kernels.flash_bias_func(q, k, v, *factors, None, False, 0.25)
    q, k, v, *factors = (tensor.double().transpose(1, 2) for tensor in (q, k, v, *factors))
    oracle = ((q @ k.mT * 0.25 + factors[0] @ factors[1].mT).softmax(-1) @ v).transpose(1, 2)
    assert (out.double() - oracle).abs().max() <= 4 * 2.0**-11 * oracle.abs().max()


@pytest.mark.parametrize("space", [2, 3])
def test_whole_model_trains_like_the_exact_one(neural_solver, host, make_model, monkeypatch, space):
    """Five steps of the patched model, and of one whose attention is computed by the book in float64."""
    model = make_model(space)
    double = copy.deepcopy(model).double()
    points = torch.rand(2, 40, space, device=DEVICE)
    wanted = points.sum(-1, keepdim=True).sin()

    def losses(model, points):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        found = []
        for _ in range(5):
            loss = (model(points, None) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    found = losses(model, points)
    with monkeypatch.context() as context:
        context.setattr(host.Model, "get_matrix", lambda self, points: (points, points))
        context.setattr(host.Spatial_Bias_Attention, "forward", lambda self, x, points, _: by_the_book(self, x, points))
        oracle = losses(double, points.double())
    assert found[-1] < found[0]
    assert found == pytest.approx(oracle, rel=1e-5 if DEVICE == "cpu" else 1e-3)
