"""Long calls of Falcon in half precision: its rounded ALiBi as factors, which the fastest kernels take."""

import copy

import pytest
import torch
from prompts import DEVICE, make_ids, make_mask

from flashbias import ALiBi, DenseBias, FactoredBias
from flashbias.testing import assert_as_accurate

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
FOUR = {"hidden_size": 96}  # head dim 16, whose root is a power of two


@pytest.fixture
def biases(alibi, monkeypatch):
    """The kinds of bias of all calls of the operator; a call is long from 8 queries on."""
    from flashbias.integrations import language_models
    from flashbias.prepared import Prepared

    made = []
    operator = Prepared.__call__

    def noting(self, query, key, value):
        made.append(type(self.bias))
        return operator(self, query, key, value)

    monkeypatch.setattr(Prepared, "__call__", noting)
    monkeypatch.setattr(language_models, "LONG", 8)
    return made


def run(model, dtype, ids, mask=None):
    """Logits, and the gradients of all weights."""
    model = copy.deepcopy(model).to(dtype)
    logits = model(ids, attention_mask=mask).logits
    (logits * torch.linspace(-1, 1, logits.numel(), device=DEVICE).view_as(logits).sin().to(dtype)).sum().backward()
    return {"logits": logits} | {name: p.grad for name, p in model.named_parameters()}


@HALVES
@pytest.mark.parametrize("options", [{}, {"multi_query": True}], ids=["heads", "one key head"])
def test_factors_are_as_close_to_fp32_as_the_host(make_model, stock, biases, dtype, options):
    model, ids = make_model("falcon", **FOUR, **options), make_ids(2, 300)
    ours = run(model, dtype, ids)
    assert set(biases) == {FactoredBias}
    with stock():
        theirs, oracle = run(model, dtype, ids), run(model, torch.float32, ids)
    sizes = {name: entry.abs().max() for name, entry in oracle.items()}
    ours, theirs, oracle = (
        torch.cat([(found[name] / sizes[name]).flatten().float() for name in sizes]) for found in (ours, theirs, oracle)
    )
    assert_as_accurate("logits and gradients", ours, theirs, oracle, dtype)


@HALVES
def test_far_keys_are_as_exact_by_factors_as_by_positions(alibi, dtype):
    """A chunk behind 30,000 keys: positions as high as that in both columns, of which scores keep the difference."""
    from flashbias.integrations.alibi import falcon
    from flashbias.integrations.alibi.positions import Positions

    class Config:
        num_attention_heads = 4

    n_q, n_k = 24, 30024
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, n, 64, device=DEVICE).to(dtype) for n in (n_q, n_k, n_k))
    positions = falcon._round(Positions(n_q, n_k, n_k - n_q, None), Config, torch.device(DEVICE))
    ours = positions.attend(query, key, value, 0.125, falcon._factors(positions, 0.125))
    by_head = falcon._by_head(positions, 0.125)
    theirs = by_head.attend(*(part.unsqueeze(2) for part in (query, key, value)), 0.125).squeeze(2)
    scores = 0.125 * (query.double() @ key.double().mT + positions.k_positions.double()[:, :, None])
    hidden = ~positions.allowed(torch.device(DEVICE))
    oracle = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.double()
    assert_as_accurate("output", ours, theirs, oracle, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_query_behind_far_keys_and_a_hole(alibi, dtype):
    """Its ALiBi is one row, in memory that the kernels read as it lies."""
    from flashbias.integrations.alibi import falcon
    from flashbias.integrations.alibi.positions import Positions

    class Config:
        num_attention_heads = 4

    n_k = 30_001
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, n, 64, device=DEVICE).to(dtype) for n in (1, n_k, n_k))
    tokens = torch.ones(2, n_k, device=DEVICE)
    tokens[0, 29_900:29_990] = 0
    positions = Positions.place(1, n_k, n_k - 1, tokens, torch.device(DEVICE))
    positions = falcon._round(positions, Config, torch.device(DEVICE))
    bias = falcon._row(positions, 0.125)
    values = bias.values
    assert (values.shape, values.dtype) == ((2, 4, 1, n_k), torch.float32)
    assert values.stride(-1) == 1
    assert all(stride % 16 == 0 for stride in values.stride()[:2])
    ours = positions.attend(query, key, value, 0.125, bias)
    by_head = falcon._by_head(positions, 0.125)
    theirs = by_head.attend(*(part.unsqueeze(2) for part in (query, key, value)), 0.125).squeeze(2)
    scores = 0.125 * (query.double() @ key.double().mT + positions.k_positions.double()[:, :, None])
    oracle = scores.masked_fill(tokens[:, None, None] == 0, -torch.inf).softmax(-1) @ value.double()
    assert_as_accurate("output", ours, theirs, oracle, dtype)


def test_chunks_of_a_prompt_and_steps(make_model, stock, biases, transformers):
    model, ids = make_model("falcon", **FOUR).bfloat16(), make_ids(2, 40)
    cache, parts = transformers.DynamicCache(), []
    with torch.no_grad():
        for first, end in ((0, 20), (20, 37), (37, 38), (38, 40)):
            parts.append(model(ids[:, first:end], past_key_values=cache, use_cache=True).logits)
        with stock():
            theirs, oracle = model(ids).logits, copy.deepcopy(model).float()(ids).logits
    kinds = FactoredBias, FactoredBias, DenseBias, ALiBi
    assert biases == [kind for kind in kinds for _ in range(2)], "two layers; two long chunks, one query, two of them"
    size = oracle.abs().max()
    assert_as_accurate("logits", torch.cat(parts, 1) / size, theirs / size, oracle / size, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "mask", "kind"),
    [
        (torch.bfloat16, 96, None, FactoredBias),
        (torch.bfloat16, 96, "left", ALiBi),
        (torch.float32, 96, None, ALiBi),
        (torch.bfloat16, 48, None, ALiBi),
    ],
    ids=["half precision", "padding", "fp32", "a scale that is no power of two"],
)
def test_factors_serve_where_they_are_exact(make_model, biases, dtype, hidden_size, mask, kind):
    model = make_model("falcon", hidden_size=hidden_size).to(dtype)
    with torch.no_grad():
        model(make_ids(3, 11), attention_mask=make_mask(mask, 3, 11))
    assert set(biases) == {kind}


def test_factors_in_one_graph(make_model, biases):
    model, ids = make_model("falcon", **FOUR, num_hidden_layers=1).bfloat16(), make_ids(2, 20)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for n in (12, 20):
            ours = compiled(ids[:, :n], use_cache=False).logits
            torch.testing.assert_close(ours, model(ids[:, :n]).logits, rtol=0.05, atol=0.1)
    assert set(biases) == {FactoredBias}
    torch.compiler.reset()
