"""`flashbias.nn.ALiBiAttention`: against the formula, with padding, in steps through a cache."""

import copy
import math

import pytest
import torch
from prompts import Operations

from flashbias import FlashBiasError, nn
from flashbias.testing import assert_as_accurate


def by_the_book(module, x, tokens=None):
    """The module's result, dense, in the dtype of x."""
    batch, n, channels = x.shape
    heads, kv_heads, c = module.heads, module.kv_heads, module.head_dim
    q, k, v = module.qkv(x).split([heads * c, kv_heads * c, kv_heads * c], -1)
    q, k, v = (part.view(batch, n, -1, c).transpose(1, 2) for part in (q, k, v))
    k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
    tokens = torch.ones(batch, n, dtype=torch.bool, device=x.device) if tokens is None else tokens
    positions = (tokens.cumsum(-1) - 1).to(x.dtype)
    distance = positions[:, None, :] - positions[:, :, None]
    if not module.causal:
        distance = -distance.abs()
    scores = q @ k.mT / math.sqrt(c) + module.slopes.to(x.dtype)[:, None, None] * distance[:, None]
    allowed = tokens[:, None, None, :].expand(batch, 1, n, n)
    if module.causal:
        allowed = allowed.tril()
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return module.out((weights @ v).transpose(1, 2).reshape(batch, n, channels))


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 50])
def test_slopes_are_those_of_the_paper(heads):
    power = 2 ** math.floor(math.log2(heads))
    expected = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    expected += [2 ** (-8 * (h + 1) / (2 * power)) for h in range(2 * power)][::2][: heads - power]
    torch.testing.assert_close(nn.alibi_slopes(heads), torch.tensor(expected), rtol=1e-6, atol=0)


def test_the_papers_case_is_one_line(device):
    module = nn.ALiBiAttention(1600, 50, device=device)
    assert module.head_dim == 32
    assert module(torch.randn(1, 5, 1600, device=device)).shape == (1, 5, 1600)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"causal": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_output_and_gradients(device, options, padded):
    module = nn.ALiBiAttention(32, 4, learn_slopes=True, **options).to(device)
    x = torch.randn(2, 21, 32, device=device)
    tokens = None
    if padded:
        tokens = torch.rand(2, 21, device=device) < 0.7
        tokens[0, :4] = False  # on the left
        tokens[:, 10] = True
    weight = torch.randn(2, 21, 32, device=device)
    if tokens is not None:
        weight = weight * tokens[..., None]
    results = {}
    for name, dtype in (("ours", torch.float32), ("eager", torch.float32), ("oracle", torch.float64)):
        twin = copy.deepcopy(module).to(dtype)
        given = x.detach().clone().to(dtype).requires_grad_()
        out = twin(given, tokens=tokens) if name == "ours" else by_the_book(twin, given, tokens)
        (out * weight.to(dtype)).sum().backward()
        gradients = {key: parameter.grad.clone() for key, parameter in twin.named_parameters()}
        results[name] = {"out": out * weight.to(dtype), "x": given.grad, **gradients}
    for key, oracle in results["oracle"].items():
        assert oracle.abs().max() > 0
        assert_as_accurate(key, results["ours"][key], results["eager"][key], oracle, torch.float32)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("steps", [[7, 1, 1, 5], [1] * 14, [14]], ids=str)
def test_in_steps_through_a_cache_as_at_once(device, steps, padded):
    module = nn.ALiBiAttention(24, 3, device=device)
    x = torch.randn(2, 14, 24, device=device)
    tokens = torch.ones(2, 14, dtype=torch.bool, device=device)
    tokens[1, :3] = tokens[1, 6] = not padded
    cache, parts = nn.KeyValueCache(16), []
    with torch.no_grad():
        expected = module(x, tokens=tokens)
        for step in steps:
            first, end = cache.length, cache.length + step
            parts.append(module(x[:, first:end], tokens=tokens[:, :end] if padded else None, cache=cache))
    got = torch.cat(parts, 1)
    torch.testing.assert_close(got[tokens], expected[tokens], rtol=1e-5, atol=1e-6)


def test_learned_slopes_are_saved_and_fixed_ones_are_not():
    assert "slopes" in nn.ALiBiAttention(16, 2, learn_slopes=True).state_dict()
    assert "slopes" not in nn.ALiBiAttention(16, 2).state_dict()


def test_fixed_slopes_are_fp32_where_the_parameters_are(device):
    built = nn.ALiBiAttention(24, 3, device=device)
    with torch.device("meta"):
        module = nn.ALiBiAttention(24, 3)
    assert not any("slopes" in name or "fixed" in name for name in module.state_dict())
    x = torch.randn(2, 9, 24, device=device)
    assigned = copy.deepcopy(module)
    assigned.load_state_dict(built.state_dict(), assign=True)
    emptied = module.to_empty(device=device)
    emptied.load_state_dict(built.state_dict())
    for other in (assigned, emptied):
        assert torch.equal(other(x), built(x))
    with Operations() as operations:
        built(x)
    assert not operations.calls["exp2"], "made once, and not in every call"
    half = built.to(torch.bfloat16)
    slopes = half._fixed
    assert (slopes.dtype, slopes.device) == (torch.float32, half.qkv.weight.device)


def test_compiles_in_one_graph(device):
    module = nn.ALiBiAttention(16, 2, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (9, 17):
        x = torch.randn(2, n, 16, device=device)
        tokens = torch.rand(2, n, device=device) < 0.8
        torch.testing.assert_close(compiled(x, tokens=tokens), module(x, tokens=tokens), rtol=1e-5, atol=1e-6)


def test_refusals():
    with pytest.raises(FlashBiasError, match="heads that divide channels"):
        nn.ALiBiAttention(30, 4)
    with pytest.raises(FlashBiasError, match="kv_heads that divide heads"):
        nn.ALiBiAttention(32, 4, kv_heads=3)
    cache = nn.KeyValueCache(4)
    with pytest.raises(FlashBiasError, match="capacity, 4"):
        nn.ALiBiAttention(8, 1)(torch.randn(1, 5, 8), cache=cache)
